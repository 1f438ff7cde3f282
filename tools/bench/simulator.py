"""Simulated runs beside real ones: the loop, the trainer and the router of a run, with engines that sleep.

    python -m tools.bench.simulator                    # all, about 15 minutes
    python -m tools.bench.simulator --only driver      # rollouts alone, without a trainer: 3 minutes
    python -m tools.bench.simulator --only colocated --only overlapped --tokens-per-second 50
                                                       # sampling about as slow as training

The engine is a stub (tools/bench/stub_engine.py) in the place of a server that others started
(rollout.servers). The simulator is told the engine's speed and slots, the lengths that the run sampled, and
what its ledger says of training, sync and release; it is not told how long a rollout took, nor how long the
trainer waited for one.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
import uvloop
from aiohttp import web

from megatron_pmd.config import PartialRollouts
from megatron_pmd.files import read_records
from megatron_pmd.rollout_file import read_lengths
from megatron_pmd.simulator.accounts import Played
from megatron_pmd.simulator.lengths import LogNormal, recorded
from megatron_pmd.simulator.playing import play
from megatron_pmd.simulator.scenario import EngineFleet, Rules, Scenario, TrainerTimes
from tools.bench import rollout
from tools.bench.stub_engine import STOP_TOKEN, StubEngine

ROOT = Path(__file__).parents[2]
PROMPTS, SAMPLES, STEP, EXTRA = 16, 4, 4, 4
ENGINE = {"median_tokens": 30, "sigma": 0.8, "tokens_per_second": 10, "slots": 16}
MOST_TOKENS = 120
"""Of a response; a prompt and it are within the 512 positions of the recipe's model."""
SIMULATED = 400
"""Iterations: so many that the simulated mean has no error of its own."""
WARM_UP = 2
"""Iterations of a real run that do not count: the first one compiles, partial ones fill."""
SETTINGS = [
    "layout.data=1", "layout.expert=1", "rollout.ranks_per_engine=null", "sync.transport=disk",
    "sync.mean_log_prob_difference=1e9", "sync.p99_log_prob_difference=1e9", "warm_start=null",
    "data.evaluation=null", "checkpoint.every=null", "checkpoint.hf_export=false",
    "actor.experts.replay_routing=false", f"batch.prompts_per_rollout={PROMPTS}",
    f"batch.samples_per_prompt={SAMPLES}", f"batch.prompts_per_step={STEP}",
    f"batch.max_response_tokens={MOST_TOKENS}",
]  # fmt: skip


KINDS: dict[str, tuple[Rules, list[str]]] = {
    "colocated": (Rules(PROMPTS, SAMPLES, STEP), []),
    "partial": (
        Rules(PROMPTS, SAMPLES, STEP, PartialRollouts(extra_groups=EXTRA)),
        [f"rollout.partial.extra_groups={EXTRA}"],
    ),
    "overlapped": (
        Rules(PROMPTS, SAMPLES, STEP, staleness=1),
        ["rollout.placement=separate", "rollout.staleness=1"],
    ),
    "overlapped by 2": (
        Rules(PROMPTS, SAMPLES, STEP, staleness=2),
        ["rollout.placement=separate", "rollout.staleness=2"],
    ),
}
"""What is played, and the settings of the real run."""


class StubServer(StubEngine):
    """A stub that a run takes for an SGLang server: weights are not read, and prompts have any length."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._prompts: dict[int, int] = {}

    def token(self, seed: int, position: int) -> int:
        """Within the vocabulary of the recipe's model."""
        if position == self.length(seed) - 1:
            return STOP_TOKEN
        return 4 + (seed * 31 + position * position * 7) % 90

    async def generate(self, request: web.Request) -> web.Response:
        body = json.loads(await request.read())
        seed, tokens = body["sampling_params"]["sampling_seed"], len(body["input_ids"])
        # what follows the prompt is a response that is continued; its first request had the prompt alone
        self.prompt_tokens = self._prompts.setdefault(seed, tokens)
        return await super().generate(request)

    async def tell(self, request: web.Request) -> web.Response:
        return web.json_response({"success": True, "message": "", "weight_version": self.weight_version})

    async def set_version(self, request: web.Request) -> web.Response:
        await super().set_version(request)
        return await self.tell(request)

    def routes(self, app: web.Application) -> None:
        super().routes(app)
        for path in ("/health", "/health_generate", "/model_info", "/server_info", "/get_model_info"):
            app.router.add_get(path, self.tell)
        for path in ("/flush_cache", "/update_weights_from_disk"):
            app.router.add_post(path, self.tell)


@dataclass(frozen=True)
class Measured:
    """Medians and means of a real run's iterations after the warm-up, in seconds."""

    rollout: float
    iteration: float
    iterations: list[float]
    per_token: float
    release: float
    sync: float
    sampling: float
    """Of a rollout, were all slots of the engine in use all the time."""


def real_run(folder: Path, name: str, url: str, iterations: int, more: list[str]) -> Measured:
    """Run the recipe with the stub as its engine, and read its ledger."""
    command = [
        sys.executable, "-m", "megatron_pmd.cli", "train", "tiny_moe_cpu", f"name={name}",
        f"iterations={iterations}",
        f'rollout.servers=["{url}"]', *SETTINGS, *more,
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with (folder / f"{name}.log").open("w") as log:
        done = subprocess.run(command, cwd=folder, env=environment, stdout=log, stderr=log, timeout=1800)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{(folder / f'{name}.log').read_text()[-3000:]}")
    return measured(folder / "runs" / name, iterations)


def measured(run: Path, iterations: int) -> Measured:
    phases: dict[int, dict[str, float]] = defaultdict(dict)
    for line in read_records(run / "ledger.jsonl"):
        if line["phase"] not in ("start", "evaluate", "save"):
            phases[line["iteration"]][line["phase"]] = line["seconds"]
    counted = [phases[t] for t in range(WARM_UP, iterations)]
    groups = [
        group for t in range(WARM_UP, iterations) for group in read_lengths(run / "rollouts" / f"{t}.parquet")
    ]
    responses = sum(sum(lengths) for _, lengths in groups)
    tokens = responses + sum(len(lengths) * prompt for prompt, lengths in groups)
    whole = [sum(row.values()) for row in counted]
    return Measured(
        rollout=statistics.mean(row["rollout"] for row in counted),
        iteration=statistics.mean(whole),
        iterations=whole,
        per_token=sum(row["anchor"] + row["update"] for row in counted) / tokens,
        release=statistics.mean(row["release"] for row in counted),
        sync=statistics.mean(row["sync"] + row["resume"] for row in counted),
        sampling=responses / len(counted) / ENGINE["slots"] / ENGINE["tokens_per_second"],
    )


def simulated(real: Measured, rules: Rules, rollouts: Path) -> Played:
    """The same run, from the stub's settings, the run's lengths and its training times."""
    step = (1 / ENGINE["tokens_per_second"],) * int(ENGINE["slots"])
    scenario = Scenario(
        EngineFleet(1, 1, step),
        TrainerTimes(1, real.per_token, real.release, real.sync),
        rules,
    )
    return play(scenario, recorded(rollouts), SIMULATED, seed=0, warm_up=WARM_UP)


def driver(partial: PartialRollouts | None) -> dict[str, Any]:
    """The rollouts of tools/bench/rollout.py, one after another without a trainer; per second samples."""
    tail = rollout.TAIL
    real = rollout.consecutive(partial)
    rules = Rules(rollout.TAIL_GROUPS, rollout.TAIL_GROUP_SIZE, 1, partial)
    fleet = EngineFleet(1, 1, (1 / tail["tokens_per_second"],) * int(tail["slots"]))
    lengths = LogNormal(tail["median_tokens"], tail["sigma"], 1 << 20, 2)
    played = play(Scenario(fleet, TrainerTimes(1, 0.0), rules), lengths, SIMULATED // 10, 0, rollout.WARM_UP)
    return {
        "run": f"driver, {'partial' if partial else 'complete'}",
        "samples per second, real": real["samples_per_second"],
        "samples per second, simulated": played.samples_per_second,
        "difference": played.samples_per_second / real["samples_per_second"] - 1,
        "slots in use, real": real["slots_busy"],
        "slots in use, simulated": played.slots_used,
        "age, real": real["mean_age_iterations"],
        "age, simulated": played.mean_staleness,
    }


async def _serve(settings: dict[str, Any]) -> None:
    # the router first speaks HTTP/2 to an engine that it does not know
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)
    print(await StubServer(**settings).start(), flush=True)
    await asyncio.to_thread(sys.stdin.read)


def _compared(name: str, real: Measured, played: Played) -> dict[str, Any]:
    sampling = played.times.waiting / (SIMULATED - WARM_UP)
    return {
        "run": name,
        "rollout, real": real.rollout,
        "rollout, simulated": sampling,
        "iteration, real": real.iteration,
        "iteration, simulated": played.rollout_seconds,
        "difference": played.rollout_seconds / real.iteration - 1,
        "difference of rollouts": sampling / real.rollout - 1,
        "sampling with all slots in use": real.sampling,
        "iteration without waiting, real": real.iteration - real.rollout,
        "share of waiting, real": real.rollout / real.iteration,
        "share of waiting, simulated": sampling / played.rollout_seconds,
        "iterations": [round(seconds, 2) for seconds in real.iterations],
    }


def main(
    iterations: Annotated[int, typer.Option(min=WARM_UP + 2)] = 8,
    repetitions: Annotated[int, typer.Option(min=1)] = 2,
    only: Annotated[list[str] | None, typer.Option(help=f"of driver, {', '.join(KINDS)}; all")] = None,
    tokens_per_second: Annotated[float, typer.Option(help="of one response")] = ENGINE["tokens_per_second"],
    serve: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Make the runs, play them, and print both, a line of JSON a run."""
    ENGINE["tokens_per_second"] = tokens_per_second
    if serve:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(ENGINE))
        return
    if not only or "driver" in only:
        extra = PartialRollouts(extra_groups=rollout.EXTRA_GROUPS, max_staleness=100)
        for partial in (None, extra):
            load = {"load": os.getloadavg()[0], "cores": os.cpu_count()}
            print(json.dumps(driver(partial) | load), flush=True)
    runs_of_the_loop(iterations, repetitions, [kind for kind in only or KINDS if kind in KINDS])


def runs_of_the_loop(iterations: int, repetitions: int, kinds: list[str]) -> None:
    """Whole runs, with router and trainer; a line of JSON each."""
    speed = f"--tokens-per-second={ENGINE['tokens_per_second']}"
    command = [sys.executable, "-m", "tools.bench.simulator", "--serve", speed]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for turn in range(repetitions):
            for kind in kinds:
                rules, more = KINDS[kind]
                load = os.getloadavg()[0]
                pipe = subprocess.PIPE
                stub = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT)
                assert stub.stdin is not None and stub.stdout is not None
                try:
                    url = f"http://127.0.0.1:{int(stub.stdout.readline())}"
                    name = f"{kind.replace(' ', '-')}-{turn}"
                    real = real_run(folder, name, url, iterations, [f"seed={turn}", *more])
                finally:
                    stub.stdin.close()
                    stub.wait(60)
                rollouts = folder / "runs" / name / "rollouts"
                found = _compared(f"{kind}, turn {turn}", real, simulated(real, rules, rollouts))
                print(json.dumps(found | {"load": load, "cores": os.cpu_count()}), flush=True)


if __name__ == "__main__":
    typer.run(main)
