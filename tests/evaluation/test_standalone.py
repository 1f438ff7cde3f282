"""`megatron-pmd evaluate`: what it works out from a model or a run, and one by a real engine."""

from __future__ import annotations

import contextlib
import http.server
import io
import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pytest
import rich.console
import torch
from typer.testing import CliRunner

from megatron_pmd.cli.main import app
from megatron_pmd.config import FileSource, Model, RunConfig, override
from megatron_pmd.data.problems import Problem
from megatron_pmd.errors import ConfigError, DataError, ModelError, StaleWeights
from megatron_pmd.evaluation import standalone
from megatron_pmd.evaluation.estimates import Evaluation, Score
from megatron_pmd.evaluation.standalone import EvaluationRequest, Task, table, task
from megatron_pmd.observe.console import Console
from megatron_pmd.rewards.pool import Verdict
from megatron_pmd.rollout.generate_client import Endpoint
from megatron_pmd.rollout.groups import DrawSettings, RolloutGroups
from megatron_pmd.rollout.sampler import Limits, Sampler
from megatron_pmd.rollout_file import read_rollout
from recipes.tiny_moe_cpu import make_model, tiny_moe_cpu
from tests.forked_command import ForkedCommand

needs_cpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the CPU engine is for machines without CUDA"
)


@pytest.fixture
def run_folder(tmp_path) -> Path:
    """A run with two exported models, as `train` leaves it, without weights."""
    config: RunConfig = tiny_moe_cpu()
    for iteration in (9, 10):
        (tmp_path / "run" / "hf" / f"iteration-{iteration}").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text(json.dumps(config.model_dump(mode="json")))
    return tmp_path / "run"


def write_model(folder: Path, **description) -> Path:
    folder.mkdir()
    described = {"model_type": "qwen3", "dtype": "float32", "max_position_embeddings": 512} | description
    (folder / "config.json").write_text(json.dumps(described))
    return folder


def test_a_run_is_evaluated_as_it_evaluates_itself(run_folder):
    config, work = tiny_moe_cpu(), task(EvaluationRequest(run_folder))
    assert work.model.path == str(run_folder / "hf" / "iteration-10")  # not 9, as sorting the names would say
    (source,) = work.sources
    assert (work.iteration, source.source, work.limit) == (
        10,
        config.data.evaluation,
        config.evaluation.prompts,
    )
    assert (source.reward, work.max_response_tokens) == (config.reward, config.batch.max_response_tokens)
    assert (work.temperature, work.samples_per_prompt) == (config.evaluation.temperature, 32)


def test_another_reward_is_not_given_what_the_runs_own_has(run_folder):
    judge = 'reward={"name": "judge", "judge": {"url": "http://127.0.0.1:9", "model": "x"}}'
    own, other = (
        task(EvaluationRequest(run_folder, reward=reward, settings=(judge,))).sources[0].reward
        for reward in ("judge", "exact")
    )
    assert own.judge is not None and (other.name, other.judge) == ("exact", None)


def test_what_is_asked_for_wins_over_what_the_run_says(run_folder):
    request = EvaluationRequest(
        run_folder, data=Path("other.jsonl"), reward="exact", answer="last_line", max_response_tokens=99,
        temperature=0.0, limit=7, samples_per_prompt=4,
    )  # fmt: skip
    work = task(request)
    (source,) = work.sources
    assert (source.source.kind, getattr(source.source, "path", None)) == ("file", "other.jsonl")
    assert (source.reward.name, source.reward.answer) == ("exact", "last_line")
    assert (work.max_response_tokens, work.temperature, work.limit) == (99, 0.0, 7)
    assert work.folder == run_folder / "evaluate" / "iteration-10-other-k4"


def test_settings_say_how_the_file_is_read_and_change_what_the_run_says(run_folder, tmp_path):
    model, keys = write_model(tmp_path / "model"), ("data.train.answer_key=label", "data.prompt_suffix=!")
    request = EvaluationRequest(model, Path("p.jsonl"), reward="exact", max_response_tokens=8, settings=keys)
    work = task(request)
    (source,) = work.sources
    assert (getattr(source.source, "answer_key", None), source.data.prompt_suffix) == ("label", "!")
    assert task(EvaluationRequest(run_folder, settings=("evaluation.top_p=0.5",))).top_p == 0.5


@pytest.mark.parametrize("train", ["", '{"kind": "file", "path": "t.jsonl"}', "mixture"])
def test_the_files_own_settings_win_over_the_columns_of_the_runs_held_out_file(run_folder, train):
    """Whatever data.train of the run is: here reasoning-gym, a file, and several sources."""
    if train == "mixture":
        train = json.dumps([{"name": "a", "source": {"kind": "file", "path": "t.jsonl"}}])
    held_out = {"kind": "file", "path": "h.jsonl", "prompt_key": "question", "answer_key": "solution"}
    config = override(
        tiny_moe_cpu(),
        [f"data.evaluation={json.dumps(held_out)}", *([f"data.train={train}"] if train else [])],
    )
    (run_folder / "config.json").write_text(json.dumps(config.model_dump(mode="json")))

    def read(*settings: str) -> Any:
        (source,) = task(EvaluationRequest(run_folder, data=Path("p.jsonl"), settings=settings)).sources
        return source.source

    as_held_out = FileSource.model_validate(held_out | {"path": "p.jsonl"})
    assert read() == as_held_out
    assert read("data.train.answer_key=label") == as_held_out.model_copy(update={"answer_key": "label"})
    for wrong, said in (
        ("data.train.path=other.jsonl", r"data\.train is p\.jsonl, the file that was named"),
        ("data.train.0.source.answer_key=label", r"data\.train\.0 is not a setting"),
    ):
        with pytest.raises(ConfigError, match=said):
            read(wrong)


def test_a_run_with_several_held_out_sources_is_evaluated_on_each_by_its_own_reward(run_folder):
    gym = {"kind": "reasoning_gym", "task": "spell_backward", "size": 9}
    own = {"reward": {"name": "math", "answer": "last_line"}, "max_response_tokens": 4}
    held_out = [{"name": "plain", "source": gym}, {"name": "strict", "source": gym, **own}]
    settings = (f"data.evaluation={json.dumps(held_out)}",)
    plain, strict = task(EvaluationRequest(run_folder, settings=settings)).sources
    assert (plain.name, plain.reward.name, plain.max_response_tokens) == ("plain", "exact", None)
    assert (strict.reward.name, strict.reward.answer, strict.max_response_tokens) == ("math", "last_line", 4)
    asked = EvaluationRequest(run_folder, reward="exact", max_response_tokens=6, settings=settings)
    assert [s.reward.name for s in task(asked).sources] == ["exact", "exact"]
    assert [s.max_response_tokens for s in task(asked).sources] == [None, None]


def test_the_table_has_the_result_of_each_source():
    score = Score(0.5, 0.4, 0.6)
    one = Evaluation(2, 8, score, score, 3.0, 0.0, 0)
    both = replace(one, sources={"sums": one, "words": replace(one, mean_at_k=Score(0.25, 0.2, 0.3))})
    out = io.StringIO()
    work = SimpleNamespace(model=Model(path="m"), temperature=1.0, max_response_tokens=4)
    rich.console.Console(file=out, width=100).print(table(cast("Task", work), both))
    rows = re.findall(r"^ *((?:\w+: )?(?:mean|pass)@2) +(\S+)", out.getvalue(), re.MULTILINE)
    assert rows == [
        ("mean@2", "0.500"), ("pass@2", "0.500"), ("sums: mean@2", "0.500"), ("sums: pass@2", "0.500"),
        ("words: mean@2", "0.250"), ("words: pass@2", "0.500"),
    ]  # fmt: skip


def test_a_run_without_an_exported_model_says_so(run_folder):
    for export in (run_folder / "hf").iterdir():
        export.rmdir()
    with pytest.raises(ModelError, match=r"no exported model.*hf_export"):
        task(EvaluationRequest(run_folder))


def test_a_model_needs_problems_and_a_reward(tmp_path):
    model = write_model(tmp_path / "model")
    with pytest.raises(ConfigError, match="it needs --data FILE"):
        task(EvaluationRequest(model, reward="exact"))
    with pytest.raises(ConfigError, match="it needs --reward NAME"):
        task(EvaluationRequest(model, data=Path("p.jsonl")))
    with pytest.raises(ConfigError, match=r"--max-response-tokens 512 leaves no room for a prompt.*512"):
        task(EvaluationRequest(model, data=Path("p.jsonl"), reward="exact", max_response_tokens=512))
    with pytest.raises(ConfigError, match=r"the default of --max-response-tokens, 1024, leaves no room"):
        task(EvaluationRequest(model, data=Path("p.jsonl"), reward="exact"))


def test_prompts_that_leave_no_room_for_a_response_are_refused_by_the_limit_s_name(tmp_path, model):
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "1" * 600, "answer": 1}) + "\n")
    request = EvaluationRequest(
        model, data=tmp_path / "long.jsonl", reward="exact", max_response_tokens=100
    )  # fmt: skip
    limit = (
        r"longer than max_position_embeddings less --max-response-tokens=412; the shortest has 60\d tokens"
    )
    with pytest.raises(DataError, match=limit):
        standalone.run(task(request), Console(io.StringIO()))


def test_an_evaluation_never_overwrites_another_that_was_started_with_it(
    tmp_path, model, problems, monkeypatch
):
    drawn = iter("ab")
    monkeypatch.setattr(standalone, "grading", lambda *_: contextlib.nullcontext(Letters()))
    monkeypatch.setattr(standalone, "_sample", lambda *_: next(drawn))
    monkeypatch.setattr(
        standalone, "_record", lambda task, drawn, _: (task.folder / "drawn").write_text(drawn)
    )
    monkeypatch.chdir(tmp_path)
    both = [task(EvaluationRequest(model, problems, reward="exact", max_response_tokens=8))] * 2
    for work in both:
        standalone.run(work, Console(out := io.StringIO()))
    folder = both[0].folder
    other = folder.with_name(f"{folder.name}-2")
    assert [(path / "drawn").read_text() for path in (folder, other)] == ["a", "b"]
    assert f"samples and table: {other}" in out.getvalue()


@needs_cpu
def test_the_cache_holds_the_longest_prompt_and_its_response(tmp_path):
    model = write_model(tmp_path / "model", max_position_embeddings=100_000)
    work = task(EvaluationRequest(model, Path("p.jsonl"), reward="exact", max_response_tokens=8_000))
    long = [Problem(0, (), "", tokens=(1,) * length) for length in (5, 9_000)]
    assert standalone._engine(work, long).max_total_tokens == 17_000
    assert standalone._engine(work, long[:1]).max_total_tokens == standalone.CPU_CACHE_TOKENS


@pytest.mark.parametrize(
    "words",
    [
        ["evaluate", "model", "--temperature", "inf"],
        ["convert", "hf-to-megatron", "model", "--out", "x", "--shard-gigabytes", "inf"],
    ],
)
def test_a_number_of_the_command_line_is_finite(words):
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2 and f"Invalid value for '{words[-2]}'" in result.output


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no config\.json there"):
        task(EvaluationRequest(tmp_path))
    with pytest.raises(ModelError, match="dtype 'float64' is none of"):
        model = write_model(tmp_path / "model", dtype="float64")
        task(EvaluationRequest(model, data=Path("p.jsonl"), reward="exact", max_response_tokens=8))


class Letters:
    """A tokenizer of one letter a token, and a grader that likes everything."""

    def decode(self, tokens: list[int], **_: Any) -> str:
        return "".join(chr(97 + token) for token in tokens)

    def submit(self, response: str, problem: Problem, truncated: bool) -> Future[Verdict]:
        verdict: Future[Verdict] = Future()
        verdict.set_result(Verdict(1.0))
        return verdict


@contextlib.contextmanager
def answering(version: str, most: list[int]) -> Iterator[str]:
    """A server that answers /generate under this weight version; most[0] counts the requests at one time."""
    present, lock = 0, threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            nonlocal present
            with lock:
                present += 1
                most[0] = max(most[0], present)
            self.rfile.read(int(self.headers["Content-Length"]))
            time.sleep(0.05)
            information = {
                "weight_version": version,
                "finish_reason": {"type": "stop"},
                "output_token_logprobs": [[-1.0, 3, None]],
            }
            body = json.dumps({"output_ids": [3], "meta_info": information}).encode()
            with lock:
                present -= 1
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def sampler_for(url: str, **changes: Any) -> Sampler:
    endpoint = Endpoint(url, (), {}, 20.0, retries=0, any_engine_alive=lambda: True, **changes)
    return Sampler(endpoint, Letters(), stop_tokens=[0], limits=Limits(1), grader=Letters())


def small_rollout() -> RolloutGroups:
    problem = Problem(index=0, messages=({"role": "user", "content": "?"},), answer="d", tokens=(1, 2))
    return RolloutGroups([problem] * 4, DrawSettings(4, 0, 7, temperature=1.0, top_p=1.0, run_seed=0))


@pytest.mark.parametrize("served", ["none", "6", "70"])
def test_samples_of_any_other_weight_version_are_refused(served):
    rollout = small_rollout()
    with answering(served, [0]) as url, pytest.raises(StaleWeights, match=f"version {served}, expected 7"):
        sampler_for(url).run(rollout)
    assert rollout.finished == 0 and rollout.samples(Letters()) == []


def test_no_more_requests_are_sent_at_one_time_than_asked_for():
    rollout, most = small_rollout(), [0]
    with answering("7", most) as url:
        sampler_for(url, max_in_flight=3).run(rollout)
    assert most[0] == 3
    assert [s.weight_version for s in rollout.samples(Letters())] == [7] * 16


def start(folder: Path, *arguments: str | Path) -> ForkedCommand:
    """`megatron-pmd evaluate …` in this folder."""
    return ForkedCommand(["evaluate", *map(str, arguments)], folder, folder / "printed", {})


def processes_in(folder: Path) -> list[psutil.Process]:
    """Those that were started there: every process of a command inherits its working directory."""
    return [p for p in psutil.process_iter(["cwd", "cmdline"]) if p.info["cwd"] == str(folder)]


@pytest.fixture
def model(tmp_path) -> Path:
    make_model(tmp_path / "moe")
    return tmp_path / "moe"


@pytest.fixture
def problems(tmp_path) -> Path:
    file = tmp_path / "sums.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{a} + 2 =", "answer": a + 2}) + "\n" for a in range(3)))
    return file


@pytest.mark.slow
@needs_cpu
def test_samples_come_from_the_folder_s_weights_and_nothing_stays_behind(tmp_path, model, problems):
    """The engine's log-probabilities are those that transformers computes from the same files."""
    from transformers import AutoModelForCausalLM

    options = (
        "--data",
        problems,
        "-k",
        "4",
        "--reward",
        "exact",
        "--max-response-tokens",
        "6",
        "--limit",
        "2",
    )
    running = start(tmp_path, model, *options)
    printed, _ = running.communicate(timeout=240)
    assert running.returncode == 0, printed
    assert "mean@4" in printed and "pass@4" in printed

    folder = tmp_path / "runs" / "evaluate" / "moe-sums-k4"
    assert f"samples and table: {folder.relative_to(tmp_path)}" in printed
    samples, _ = read_rollout(folder / "samples.parquet")
    assert sorted((s.group, s.number) for s in samples) == [(g, n) for g in range(2) for n in range(4)]
    assert len({s.seed for s in samples}) == 8
    result = json.loads((folder / "result.json").read_text())["result"]
    assert result["mean_at_k"]["value"] == sum(s.response.strip() == s.answer for s in samples) / 8
    assert result["reward_errors"] == 0

    reference = AutoModelForCausalLM.from_pretrained(model).eval()
    for s in samples:
        with torch.no_grad():
            logits = reference(torch.from_numpy(s.tokens)[None].long()).logits[0]
        expected = logits.log_softmax(-1)[len(s.prompt_tokens) - 1 : -1]
        expected = expected.gather(1, torch.from_numpy(s.response_tokens).long()[:, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(s.engine_log_probs), expected, atol=1e-4, rtol=0)
    assert processes_in(tmp_path) == []


@pytest.mark.slow
@needs_cpu
def test_ctrl_c_while_the_engine_starts_leaves_no_process(tmp_path, model, problems):
    options = ("--data", problems, "--reward", "exact", "--max-response-tokens", "6")
    running = start(tmp_path, model, *options)
    try:
        deadline = time.monotonic() + 60
        while not any("sglang.launch_server" in p.info["cmdline"] for p in processes_in(tmp_path)):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        time.sleep(1)  # the server is importing, its own children come and go
        family = psutil.Process(running.pid).children(recursive=True)
        os.kill(running.pid, signal.SIGINT)
        running.communicate(timeout=20)
        assert running.returncode != 0
        assert psutil.wait_procs(family, timeout=5)[1] == []
        assert processes_in(tmp_path) == []
    finally:
        running.kill()
