"""`megatron-pmd evaluate`: one engine serves a model folder, k responses to each problem are graded."""

from __future__ import annotations

import json
import os
import secrets
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import rich.console
from rich import box
from rich.table import Table
from rich.text import Text

from megatron_pmd.batch import Sample
from megatron_pmd.config import (
    FileSource,
    Model,
    Precision,
    ProblemSource,
    Reward,
    Rollout,
    RunConfig,
    Stage,
    data_of_file,
    load,
    override,
)
from megatron_pmd.config.data import ASKED
from megatron_pmd.data.problems import Problem
from megatron_pmd.data.prompts import tokenize
from megatron_pmd.data.sources import named, problems_of
from megatron_pmd.data.tokenizer import load_tokenizer
from megatron_pmd.engine.control import EngineControl
from megatron_pmd.engine.keys import Keys
from megatron_pmd.engine.server import free_port, tail
from megatron_pmd.engine.sglang_server import EngineProcess, EngineSpec
from megatron_pmd.errors import ConfigError, EngineError, EnginesLost, ModelError
from megatron_pmd.evaluation.estimates import Evaluation, evaluate
from megatron_pmd.files import iterations_in, read_object, write_whole
from megatron_pmd.observe.console import Console
from megatron_pmd.observe.quantities import number, percent
from megatron_pmd.observe.versions import versions
from megatron_pmd.rewards.grading import grading
from megatron_pmd.rollout.generate_client import Endpoint
from megatron_pmd.rollout.groups import DrawSettings, RolloutGroups
from megatron_pmd.rollout.sampler import Limits, Sampler, maker_of, stop_tokens
from megatron_pmd.rollout_file import write_rollout

DEFAULT_RESPONSE_TOKENS = 1024
CPU_CACHE_TOKENS = 16384
_NEAREST: tuple[Stage, ...] = ("evaluation", "train")
"""Whose columns a file is read by that is given in their place."""
REQUESTS_PER_SLOT = 4
"""Requests in flight for each that the engine decodes: its queue is never empty, and none waits for long."""


@dataclass(frozen=True)
class EvaluationRequest:
    """The command line. None: what the run says, or the default for a model folder."""

    target: Path
    data: Path | None = None
    samples_per_prompt: int = 32
    reward: str | None = None
    answer: str | None = None
    max_response_tokens: int | None = None
    temperature: float | None = None
    limit: int | None = None
    settings: tuple[str, ...] = ()
    """`dotted.key=value` of the run's configuration, but that data.train.* are how the file is read; of a
    model folder only data.*."""


@dataclass(frozen=True)
class Task:
    """An evaluation with nothing left open."""

    model: Model
    iteration: int
    """Of the run that the model is from, and the weight version its samples carry; 0 for a model folder."""
    sources: tuple[ProblemSource, ...]
    limit: int | None
    """The first so many problems of each."""
    rollout: Rollout
    samples_per_prompt: int
    temperature: float
    top_p: float
    max_response_tokens: int
    seed: int
    folder: Path
    """Results and logs go here, or beside it where it is taken."""

    @property
    def longest_prompt(self) -> int:
        return max(source.max_prompt_tokens for source in self.sources)

    @property
    def log(self) -> Path:
        return self.folder / "logs" / "engine-0.log"


def task(request: EvaluationRequest) -> Task:
    """Work out what is asked for; ConfigError or ModelError for what is missing or does not fit."""
    found = read_object(request.target / "config.json")
    if found is None:
        raise ConfigError(
            f"{request.target}: no config.json there; give a Hugging Face model folder, or a run's folder"
        )
    return _of_model(request, found) if "model_type" in found else _of_run(request)


def _of_run(request: EvaluationRequest) -> Task:
    """The run's newest exported model, under its own evaluation settings."""
    of_file = [s for s in request.settings if request.data and s.startswith("data.train.")]
    others = [s for s in request.settings if s not in of_file]
    config = override(load(request.target / "config.json"), others)
    exports = iterations_in(request.target / "hf")
    if not exports:
        raise ModelError(
            f"{request.target} holds no exported model (hf/iteration-N): train it to the end with "
            "checkpoint.hf_export=true"
        )
    iteration = max(exports)
    limit, batch = None, config.batch
    sources = config.problem_sources("evaluation")
    if request.data is not None:
        [file] = data_of_file(_file(request.data, config), of_file).sources_of("train").values()
        sources = (ProblemSource.of("--data", file, config.data, config.reward, batch.max_prompt_tokens),)
    elif sources:
        limit = config.evaluation.prompts
    else:
        raise ConfigError(f"{request.target} has no held-out problems (data.evaluation); give --data FILE")
    response = request.max_response_tokens or batch.max_response_tokens
    name = f"iteration-{iteration}-{request.data.stem if request.data else 'held-out'}"
    return Task(
        model=config.model.model_copy(update={"path": str(exports[iteration])}),
        iteration=iteration,
        sources=tuple(_as_asked(request, source) for source in sources),
        limit=request.limit or limit,
        rollout=config.rollout,
        samples_per_prompt=request.samples_per_prompt,
        temperature=config.evaluation.temperature if request.temperature is None else request.temperature,
        top_p=config.evaluation.top_p,
        max_response_tokens=response,
        seed=config.seed,
        folder=request.target / "evaluate" / f"{name}-k{request.samples_per_prompt}",
    )


def _of_model(request: EvaluationRequest, description: dict[str, Any]) -> Task:
    """A model folder says how it is computed; the problems and their reward must be given."""
    if request.data is None or request.reward is None:
        missing = "--data FILE" if request.data is None else "--reward NAME (math, exact, or module:function)"
        raise ConfigError(f"{request.target} is a model, not a run: it needs {missing}")
    response = request.max_response_tokens or DEFAULT_RESPONSE_TOKENS
    context = description.get("max_position_embeddings") or CPU_CACHE_TOKENS
    if response >= context:
        given = f"--max-response-tokens {response}"
        if request.max_response_tokens is None:
            given = f"the default of --max-response-tokens, {response},"
        raise ConfigError(
            f"{given} leaves no room for a prompt: {request.target} takes {context} tokens; lower it"
        )
    name = f"{request.target.resolve().name}-{request.data.stem}-k{request.samples_per_prompt}"
    data = data_of_file(FileSource(path=str(request.data)), list(request.settings))
    reward = Reward(name=request.reward)
    limit = "max_position_embeddings less --max-response-tokens"
    sources = [
        replace(ProblemSource.of(key, given, data, reward, context - response), limited_by=limit)
        for key, given in data.sources_of("train").items()
    ]
    return Task(
        model=Model(path=str(request.target), precision=_precision(request.target, description)),
        iteration=0,
        sources=tuple(_as_asked(request, source) for source in sources),
        limit=request.limit,
        rollout=Rollout(),
        samples_per_prompt=request.samples_per_prompt,
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0,
        max_response_tokens=response,
        seed=0,
        folder=Path("runs") / "evaluate" / name,
    )


def _file(path: Path, config: RunConfig) -> FileSource:
    """The file, its columns named as those of the run's own files."""
    given = [source.source for stage in _NEAREST for source in config.problem_sources(stage)]
    own = next((source for source in given if isinstance(source, FileSource)), None)
    return own.model_copy(update={"path": str(path)}) if own else FileSource(path=str(path))


def _as_asked(request: EvaluationRequest, source: ProblemSource) -> ProblemSource:
    """With what the command line says in the place of what the source says."""
    changes = {"name": request.reward, "answer": request.answer}
    given = {key: value for key, value in changes.items() if value is not None}
    own_limit = source.max_response_tokens if request.max_response_tokens is None else None
    own = source.reward.model_dump()
    if request.reward not in (None, source.reward.name):  # what another reward is given means nothing to it
        own |= dict.fromkeys(("remote", "judge", "model", "tests_key"))
    return replace(
        source,
        reward=Reward.model_validate(own | given),
        max_response_tokens=own_limit,
    )


def _precision(folder: Path, description: dict[str, Any]) -> Precision:
    names: dict[str, Precision] = {"float32": "fp32", "bfloat16": "bf16", "float16": "bf16"}
    dtype = description.get("dtype") or description.get("torch_dtype") or "bfloat16"
    if dtype not in names:
        raise ModelError(f"{folder / 'config.json'}: dtype {dtype!r} is none of {', '.join(names)}")
    return names[dtype]


def _engine(task: Task, problems: list[Problem]) -> Rollout:
    """The one engine has this machine's cores to itself, and room for the longest sample."""
    rollout = task.rollout
    # an agent's program writes prompts of its own
    prompt = task.longest_prompt if rollout.agent else max(len(problem.tokens) for problem in problems)
    longest = prompt + task.max_response_tokens
    cache = max(rollout.max_total_tokens or CPU_CACHE_TOKENS, longest) if _cpu() else rollout.max_total_tokens
    own = {"threads_per_engine": len(os.sched_getaffinity(0)), "max_total_tokens": cache}
    return rollout.model_copy(update=own)


def _cpu() -> bool:
    import torch

    return not torch.cuda.is_available()


def _claimed(folder: Path) -> Path:
    """Make the folder, or the first free `folder-2`, `-3`, …: no evaluation overwrites another's."""
    number, claimed = 1, folder
    while True:
        try:
            claimed.mkdir(parents=True)
            return claimed
        except FileExistsError:
            number += 1
            claimed = folder.with_name(f"{folder.name}-{number}")


def run(task: Task, console: Console) -> Evaluation:
    """Sample, grade, score; leaves samples.parquet and result.json in a folder of its own, and says where.

    However it ends, the engine and the graders end with it.
    """
    tokenizer = load_tokenizer(task.model)
    kept: list[Problem] = []
    dropped = 0
    for source in task.sources:
        problems, limit = problems_of(source)[: task.limit], source.max_prompt_tokens
        with named(source):
            fitting, too_long = tokenize(problems, tokenizer, limit, source.limited_by)
        if too_long:
            console.say(f"{too_long} of {len(problems)} prompts are over {limit} tokens: dropped")
        kept, dropped = kept + fitting, dropped + too_long
    task = replace(task, rollout=_engine(task, kept), folder=_claimed(task.folder))
    settings = DrawSettings(
        samples_per_prompt=task.samples_per_prompt,
        iteration=task.iteration,
        weight_version=task.iteration,
        temperature=task.temperature,
        top_p=task.top_p,
        run_seed=task.seed,
        stream="evaluation",
    )
    rollout = RolloutGroups(kept, settings)
    with grading(task.sources[0].reward, [source.reward for source in task.sources]) as rewards:
        sampler = Sampler(
            endpoint=Endpoint(
                router_url="",  # there is one engine: it is asked without a router
                engine_urls=(),
                headers={},
                request_timeout_seconds=task.rollout.request_timeout_seconds,
                retries=task.rollout.retries,
                any_engine_alive=lambda: False,
                max_in_flight=REQUESTS_PER_SLOT * task.rollout.max_running_requests,
            ),
            tokenizer=tokenizer,
            stop_tokens=stop_tokens(tokenizer, task.model.path),
            limits=Limits(task.max_response_tokens, task.rollout.max_turns, task.rollout.repetition),
            grader=rewards,
            failed=task.sources[0].reward.failed,
            function=maker_of(task.rollout, tokenizer, task.longest_prompt),
        )
        console.say(
            f"starting an engine for {task.model.path}; a response has at most {task.max_response_tokens} "
            f"tokens (--max-response-tokens); log: {task.log}"
        )
        samples = _sample(task, rollout, sampler, console)
    result = _record(task, samples, dropped)
    console.say(f"samples and table: {task.folder}")
    return result


def _spec(task: Task) -> EngineSpec:
    return EngineSpec(
        number=0,
        model=task.model,
        rollout=task.rollout,
        port=free_port(),
        log=task.log,
        seed=task.seed,
        cpu=_cpu(),
        keys=Keys(api=secrets.token_hex(24)),
        load_model_weights=True,
    )


def _sample(task: Task, rollout: RolloutGroups, sampler: Sampler, console: Console) -> list[Sample]:
    """Draw the rollout from an engine, which is started again when it dies; what was drawn before is kept."""
    attempts = task.rollout.retries + 1
    for attempt in range(attempts):
        spec = _spec(task)
        engine = EngineProcess(spec)
        try:
            engine.wait_ready(task.rollout.start_timeout_seconds)
            with EngineControl(spec, task.rollout.start_timeout_seconds) as control:
                # No bucket in between: the weights stay the folder's, and get the number that every sample
                # must carry. Samples of an engine that was never given one are refused.
                control.begin_update()
                control.end_update(rollout.settings.weight_version)
            endpoint = replace(
                sampler.endpoint, router_url=spec.url, any_engine_alive=engine.ready,
                headers=spec.keys.headers,
            )  # fmt: skip
            with console.progress("evaluation", rollout.total - rollout.finished) as advance:
                replace(sampler, endpoint=endpoint).run(rollout, lambda _: advance())
            return rollout.samples(sampler.tokenizer)
        except EnginesLost:
            console.say(
                f"the engine died after {rollout.finished} of {rollout.total} samples ({attempt + 1} times)"
            )
            ended = tail(engine.log)
        finally:
            engine.stop()
    raise EngineError(f"the engine died {attempts} times; log: {task.log}, which ends:\n{ended}")


def _record(task: Task, samples: list[Sample], dropped: int) -> Evaluation:
    result = evaluate(samples, {source.name: source.reward.correct for source in task.sources})
    write_rollout(task.folder / "samples.parquet", samples, task.iteration)
    settings = {
        key: value.model_dump(mode="json") if hasattr(value, "model_dump") else value
        for key, value in vars(task).items()
        if key not in ("sources", "folder")
    }
    settings["sources"] = [
        {
            "name": source.name,
            "source": source.source.model_dump(mode="json"),
            "reward": source.reward.model_dump(mode="json"),
            "max_prompt_tokens": source.max_prompt_tokens,
            "max_response_tokens": source.max_response_tokens,
            **{key: getattr(source.data, key) for key in ASKED},
        }
        for source in task.sources
    ]
    content = {
        "result": asdict(result),
        "dropped_prompts": dropped,
        "settings": settings,
        "versions": versions(),
    }
    write_whole(task.folder / "result.json", json.dumps(content, indent=2) + "\n")
    return result


def table(task: Task, result: Evaluation) -> Table:
    """The result as a person reads it."""
    title = f"{task.model.path} · temperature {task.temperature:g}, at most {task.max_response_tokens} tokens"
    shown = Table(
        box=box.SIMPLE_HEAD, title=Text(title), title_justify="left", title_style="bold", pad_edge=False
    )
    shown.add_column(f"{result.prompts:,} prompts × {result.k} samples")
    shown.add_column("", justify="right")
    shown.add_column("95 % interval", justify="right")
    for of, part in {"": result, **result.sources}.items():
        for name, score in (("mean", part.mean_at_k), ("pass", part.pass_at_k)):
            title = f"{of}: {name}@{part.k}" if of else f"{name}@{part.k}"
            shown.add_row(title, number(score.value), f"{number(score.low)} – {number(score.high)}")
    shown.add_row("cut at the limit", percent(result.truncated_share), "")
    shown.add_row("response tokens", number(result.response_tokens), "")
    shown.add_row("reward errors", number(result.reward_errors), "")
    return shown


def main(request: EvaluationRequest) -> None:
    """The command: evaluate, and show the table."""
    console, work = Console(), task(request)
    rich.console.Console(highlight=False).print(table(work, run(work, console)))
