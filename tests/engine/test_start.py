"""What is said and waited for while a server starts; when an engine's kernels are compiled first."""

from __future__ import annotations

import json
import os
import re
import sys

import pytest

from megatron_pmd.config import RunConfig, override
from megatron_pmd.engine import server
from megatron_pmd.engine.server import ServerProcess
from megatron_pmd.engine.sglang_server import EngineProcess, EngineSpec
from megatron_pmd.errors import EngineError
from recipes import recipe


def test_a_start_that_takes_long_says_what_is_waited_for_until_its_deadline(
    tmp_path, monkeypatch, capsys, impatient
):
    monkeypatch.setattr(server, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(ServerProcess, "ready", lambda self: False)
    command, url = [sys.executable, "-c", "import signal; signal.pause()"], "http://127.0.0.1:9"
    never = ServerProcess("engine 3", command, os.environ, url, "/", tmp_path / "log")
    try:
        with pytest.raises(EngineError, match=r"engine 3 \(http://127\.0\.0\.1:9\) was not ready \d s"):
            never.wait_ready(0.4, "it compiles kernels")
    finally:
        never.stop()
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        rf"waiting for engine 3 \({url}\), 0 s so far, at most 0 s: it compiles kernels; log: {tmp_path}/log",
        line,
    )


def test_an_engine_that_dies_at_its_start_is_not_quoted_with_the_words_of_an_earlier_one(tmp_path):
    (tmp_path / "log").write_text("ValueError: of yesterday\n")
    command = [sys.executable, "-c", "raise SystemExit('of today')"]
    dead = ServerProcess("engine 3", command, os.environ, "http://127.0.0.1:9", "/", tmp_path / "log")
    with pytest.raises(EngineError, match=r"exited with status 1 at start; .* which ends:\nof today$"):
        dead.wait_ready(60)


@pytest.fixture
def started(tmp_path, monkeypatch):
    """Start a GPU's engine of this configuration up to its processes; what would be run."""
    monkeypatch.setenv("SGLANG_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("SGLANG_WARMUP_TIMEOUT", raising=False)
    waited: list[float] = []

    def start(self, name, command, environment, url, ready_path, log):
        self.environment = environment

    monkeypatch.setattr(ServerProcess, "__init__", start)
    monkeypatch.setattr(
        ServerProcess, "wait_ready", lambda self, seconds, meanwhile="": waited.append(seconds)
    )

    def run(config: RunConfig, port: int) -> tuple[float, EngineProcess]:
        spec = EngineSpec(
            0, config.model, config.rollout, port, tmp_path / "logs" / "engine-0.log", seed=port, cpu=False
        )
        engine = EngineProcess(spec)
        engine.wait_ready(spec.rollout.start_timeout_seconds)
        return waited[-1], engine

    return run


def test_an_engine_has_the_longer_deadline_until_its_kernels_are_compiled(started, tmp_path):
    """And so has SGLang, which would end itself after 600 s of a warm-up and 300 s of one pass."""
    config = override(recipe("qwen2_5_7b_dapo_8xh100"), ["rollout.cold_start_timeout_seconds=2000.5"])
    options = tmp_path / "logs" / "engine-0.log.yaml"
    seconds, engine = started(config, 1)
    assert seconds == 2000.5
    assert engine.environment["SGLANG_WARMUP_TIMEOUT"] == "2001"
    given = json.loads(options.read_text())
    assert given["watchdog-timeout"] == given["dist-timeout"] == 2001
    seconds, engine = started(config, 2)
    assert seconds == 300.0
    assert "SGLANG_WARMUP_TIMEOUT" not in engine.environment
    assert "watchdog-timeout" not in options.read_text()
    assert started(override(config, ["rollout.tensor_parallel=4"]), 3)[0] == 2000.5
    assert started(override(config, ['rollout.sglang={"chunked_prefill_size": 4096}']), 4)[0] == 2000.5
