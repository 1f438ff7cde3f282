"""What a running request sees of a weight update, with engines on devices of their own.

    python -m tools.bench.pause [RECIPE] [--updates 12] [--requests 1 --requests 16]

A real engine answers streamed requests. A real actor beside it gives it weights again and again, as in a run
with rollout.placement=separate. Prints a line of JSON for each rollout.pause and number of requests: how long
a load takes, how long it stands still, and the time between two tokens of a response with an update between.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, get_args

import httpx
import torch
import typer

from megatron_pmd.config import PauseMode
from megatron_pmd.engine.control import EngineControl
from megatron_pmd.engine.handover import Pauses
from megatron_pmd.network import LOOPBACK
from tools.bench.loop import machine

PROMPT_TOKENS, RESPONSE_TOKENS = 8, 64
SETTLE_SECONDS = 2.0
"""From one update to the next."""
WARM_UP = 2
"""Updates of each measurement that do not count."""


class Streams:
    """Requests that are running all the time, and what they see: (version before, after, seconds)."""

    def __init__(self, url: str, headers: dict[str, str], count: int) -> None:
        self.gaps: list[tuple[str, str, float]] = []
        self._url, self._headers, self._ended = url, headers, threading.Event()
        self._threads = [threading.Thread(target=self._stream, args=(n,), daemon=True) for n in range(count)]
        for thread in self._threads:
            thread.start()

    def _stream(self, number: int) -> None:
        sampling = {"max_new_tokens": RESPONSE_TOKENS, "ignore_eos": True}
        body = {"input_ids": [100 + number] * PROMPT_TOKENS, "sampling_params": sampling, "stream": True}
        with httpx.Client(trust_env=False, timeout=120, headers=self._headers) as client:
            while not self._ended.is_set():
                with client.stream("POST", self._url + "/generate", json=body) as response:
                    self._follow(response)

    def _follow(self, response: httpx.Response) -> None:
        version, before = "", 0.0
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            now, told = time.perf_counter(), json.loads(line[6:])["meta_info"]["weight_version"]
            if version:
                self.gaps.append((version, told, now - before))
            version, before = told, now

    def end(self) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(120)


class Stopwatch:
    """Seconds of each call of some of EngineControl's methods, and of what lies between two of them."""

    def __init__(self) -> None:
        self.loads: list[float] = []
        """By update, in all of its calls of load_bucket."""
        self.stops: list[float] = []
        """In the call of pause: the engine ends the step that is under way, and answers with its tokens."""
        self.pauses: list[float] = []
        """From when pause has returned, until go_on has."""

    @contextmanager
    def watching(self) -> Iterator[None]:
        pause, load, go_on = EngineControl.pause, EngineControl.load_bucket, EngineControl.go_on
        begun = 0.0

        def timed_pause(control: EngineControl, mode: PauseMode) -> None:
            nonlocal begun
            before = time.perf_counter()
            pause(control, mode)
            begun = time.perf_counter()
            self.stops.append(begun - before)
            self.loads.append(0.0)

        def timed_load(control: EngineControl, descriptions: Any) -> None:
            before = time.perf_counter()
            load(control, descriptions)
            self.loads[-1] += time.perf_counter() - before

        def timed_go_on(control: EngineControl) -> None:
            go_on(control)
            self.pauses.append(time.perf_counter() - begun)

        replaced: Any = EngineControl
        replaced.pause, replaced.load_bucket, replaced.go_on = timed_pause, timed_load, timed_go_on
        try:
            yield
        finally:
            replaced.pause, replaced.load_bucket, replaced.go_on = pause, load, go_on


def measure(recipe: str, updates: int, requests: list[int], folder: Path) -> Iterator[dict[str, Any]]:
    """A line for each way to pause and number of requests; all of one engine."""
    from megatron_pmd.actor.cpu import standins

    standins.install()
    from megatron_pmd.actor import parallel
    from megatron_pmd.actor.actor import Actor
    from megatron_pmd.distributed import Control
    from megatron_pmd.node.worker import prepare_model
    from megatron_pmd.observe.console import Console
    from megatron_pmd.training.separate_engines import SeparateEngines
    from recipes import configuration

    class WithoutSampler(SeparateEngines):
        """Its samples are not asked for."""

        def _started(self) -> Any: ...

        def _asked(self, ask: Any) -> Any: ...

    torch.set_num_threads(1)
    settings = [
        "layout.data=1", "layout.expert=1", "rollout.ranks_per_engine=1", "rollout.placement=separate",
        f"batch.max_response_tokens={RESPONSE_TOKENS}",
    ]  # fmt: skip
    config = configuration(recipe, settings)
    parallel.initialize(config.layout, seed=0, timeout_seconds=300)
    control = Control(300)
    prepare_model(config)
    engines = WithoutSampler(config, control, folder, None, None, Console(), cpu=True, ahead=None)
    try:
        actor = Actor(config, control)
        bytes_moved, version = engines.load(actor, 0).bytes, 0
        for mode, count in itertools.product(get_args(PauseMode), requests):
            engines.handover = Pauses(engines.fleet, engines.clock, mode)
            streams = Streams(engines.fleet.urls[0], engines.fleet.keys.headers, count)
            stopwatch = Stopwatch()
            with stopwatch.watching():
                for _ in range(updates):
                    time.sleep(SETTLE_SECONDS)
                    version += 1
                    engines.load(actor, version)
            time.sleep(SETTLE_SECONDS)
            streams.end()
            yield {"pause": mode} | _line(count, bytes_moved, stopwatch, streams.gaps)
    finally:
        engines.close()


def _line(requests: int, nbytes: int, watch: Stopwatch, gaps: list[tuple[str, str, float]]) -> dict[str, Any]:
    across = [seconds for before, after, seconds in gaps if before != after]
    within = [seconds for before, after, seconds in gaps if before == after]
    loads, stops, pauses = (values[WARM_UP:] for values in (watch.loads, watch.stops, watch.pauses))
    ratios = [pause / load for load, pause in zip(loads, pauses, strict=True)]
    return {
        "requests": requests,
        "megabytes": nbytes / 1e6,
        "load, s": statistics.median(loads),
        "until it stops, s": statistics.median(stops),
        "engine stands still, s": statistics.median(pauses),
        "still / load": statistics.median(ratios),
        "between two tokens, s": statistics.median(within),
        "between two tokens with an update between, s": statistics.median(across),
        "updates": len(loads),
        "seen": len(across),
        "load of the machine": os.getloadavg()[0],
    }


def main(
    recipe: Annotated[str, typer.Argument(help="a recipe for a CPU")] = "smollm2_135m_cpu",
    updates: Annotated[int, typer.Option(min=4)] = 12,
    requests: Annotated[list[int] | None, typer.Option(min=1, help="running at one time")] = None,
) -> None:
    """Measure, and print a line of JSON for each way to pause and number of requests."""
    os.environ |= {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
    print(json.dumps(machine()), flush=True)
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        for line in measure(recipe, updates, requests or [1, 16], Path(name)):
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    typer.run(main)
