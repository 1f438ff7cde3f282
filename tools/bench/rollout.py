"""What the driver costs with 8,192 requests in flight; what partial rollouts gain on heavy-tailed lengths.

    python -m tools.bench.rollout                      # all, about 6 minutes
    python -m tools.bench.rollout --only partial

The engine is a stub (tools/bench/stub_engine.py) in a process of its own; the driver is the loop's. Nothing
else may run on the machine meanwhile: the line of JSON at the end records the load it started under.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from megatron_pmd.config import PartialRollouts
from megatron_pmd.data.problems import Problem
from megatron_pmd.rewards.pool import Verdict
from megatron_pmd.rollout.generate_client import Endpoint
from megatron_pmd.rollout.groups import DrawSettings, EndRules, Group, RolloutGroups
from megatron_pmd.rollout.sampler import Limits, Sampler
from tools.bench.stub_engine import STOP_TOKEN, response_length

# 512 prompts of 16, all in flight; the median response takes 8 s, the longest of 8,192 about 130 s
GROUPS, GROUP_SIZE = 512, 16
SHORT = {"median_tokens": 400, "sigma": 0.75, "tokens_per_second": 50}
LONG = {"median_tokens": 4000, "sigma": 0.75, "tokens_per_second": 500}
# 64 prompts of 8 on 128 slots: four times as many responses as are decoded at one time
TAIL = {"median_tokens": 300, "sigma": 1.0, "tokens_per_second": 1500, "slots": 128}
TAIL_GROUPS, TAIL_GROUP_SIZE = 64, 8
EXTRA_GROUPS = 32
WARM_UP, MEASURED = 3, 8
"""Iterations. In the first ones the long responses have not come back yet."""


class Instant:
    """A tokenizer and a grader that cost nothing: neither is what is measured."""

    def decode(self, tokens: Any, **_: Any) -> str:
        return ""

    def submit(self, response: str, problem: Problem, truncated: bool) -> Future[Verdict]:
        verdict: Future[Verdict] = Future()
        verdict.set_result(Verdict(1.0))
        return verdict


@contextlib.contextmanager
def stub(settings: dict[str, Any]) -> Iterator[str]:
    """URL of a stub engine in a process of its own."""
    command = [sys.executable, "-m", "tools.bench.stub_engine", json.dumps(settings)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    pipe = subprocess.PIPE
    running = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
    assert running.stdin is not None and running.stdout is not None
    try:
        yield f"http://127.0.0.1:{int(running.stdout.readline())}"
    finally:
        running.stdin.close()
        running.wait()


def sampler(url: str, max_response_tokens: int) -> Sampler:
    endpoint = Endpoint(
        url, [url], {}, request_timeout_seconds=600.0, retries=0, any_engine_alive=lambda: True
    )
    return Sampler(endpoint, Instant(), [STOP_TOKEN], Limits(max_response_tokens), Instant())


def settings_of(size: int, iteration: int) -> DrawSettings:
    """Groups of this size under the weights of this iteration."""
    return DrawSettings(size, iteration, iteration, temperature=1.0, top_p=1.0, run_seed=0)


def problems(count: int) -> list[Problem]:
    return [Problem(i, (), "", tokens=(1, 2)) for i in range(count)]


def driver(settings: dict[str, Any]) -> dict[str, float]:
    """All responses in flight at once: how much later than the engine allows the driver has them."""
    rollout = RolloutGroups(problems(GROUPS), settings_of(GROUP_SIZE, iteration=0))
    seeds = [member.seed for group in rollout.groups for member in group.members]
    lengths = [response_length(seed, settings["median_tokens"], settings["sigma"]) for seed in seeds]
    ideal = [tokens / settings["tokens_per_second"] for tokens in lengths]
    finished: list[float] = []
    with stub(settings) as url:
        used, begun = time.process_time(), time.monotonic()
        sampler(url, max(lengths)).run(rollout, lambda _: finished.append(time.monotonic() - begun))
        seconds = time.monotonic() - begun
    assert sum(lengths) == rollout.accounts.sampled_tokens
    return {
        "requests": len(seeds),
        "mean_tokens": sum(lengths) / len(lengths),
        "ideal_seconds": max(ideal),
        "seconds": seconds,
        "over_ideal": seconds / max(ideal) - 1,
        "mean_lateness_seconds": (sum(finished) - sum(ideal)) / len(ideal),
        "processor_seconds": time.process_time() - used,
        "peak_gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    }


def consecutive(partial: PartialRollouts | None) -> dict[str, float]:
    """Iterations one after another, each with as many groups; only the measured ones count."""
    carried_over: list[Group] = []
    samples = tokens = 0
    ages: list[int] = []
    with stub(TAIL) as url, httpx.Client(trust_env=False) as client:

        def decoded_tokens(iteration: int) -> int:
            reply = client.post(url + "/update_weight_version", json={"new_version": str(iteration)})
            return reply.json()["decoded_tokens"]

        for t in range(WARM_UP + MEASURED):
            decoded = decoded_tokens(t)
            if t == WARM_UP:
                begun, before = time.monotonic(), decoded
            extra = partial.extra_groups if partial else 0
            rollout = RolloutGroups(
                problems(TAIL_GROUPS + extra - len(carried_over)), settings_of(TAIL_GROUP_SIZE, t),
                EndRules(wanted=TAIL_GROUPS, partial=partial), carried_over=carried_over,
            )  # fmt: skip
            sampler(url, 1 << 20).run(rollout)
            carried_over = rollout.left_over
            if t >= WARM_UP:
                members = [member for group in rollout.chosen for member in group.members]
                samples += len(members)
                tokens += sum(member.length for member in members)
                ages += [t - (member.first_version or 0) for member in members]
        seconds = time.monotonic() - begun
        decoded = decoded_tokens(t) - before
    return {
        "samples_per_second": samples / seconds,
        "trained_tokens_per_second": tokens / seconds,
        "tokens_per_sample": tokens / samples,
        "slots_busy": decoded / seconds / (TAIL["slots"] * TAIL["tokens_per_second"]),
        "mean_age_iterations": sum(ages) / len(ages),
        "max_age_iterations": max(ages),
    }


def partial_against_complete() -> dict[str, dict[str, float]]:
    """Samples per second of the same stub engine, by when a rollout ends."""
    extra = PartialRollouts(extra_groups=EXTRA_GROUPS, max_staleness=100)
    return {"complete": consecutive(None), f"partial, {EXTRA_GROUPS} extra groups": consecutive(extra)}


BENCHMARKS = {
    "short": lambda: {"driver, short responses": driver(SHORT)},
    "long": lambda: {"driver, long responses": driver(LONG)},
    "partial": partial_against_complete,
}


def main(
    only: Annotated[list[str] | None, typer.Option(help=f"of {', '.join(BENCHMARKS)}; all")] = None,
) -> None:
    """Run the benchmarks and print what they give."""
    load = os.getloadavg()[0]
    results: dict[str, dict[str, float]] = {}
    for name in only or BENCHMARKS:
        results |= BENCHMARKS[name]()
    for name, values in results.items():
        print(name)
        for key, value in values.items():
            print(f"  {key:<28}{value:>12,.3f}")
    rates = [v["samples_per_second"] for v in results.values() if "samples_per_second" in v]
    if len(rates) > 1:
        print(f"samples per second, partial against complete: {rates[1] / rates[0]:.2f}")
    print(json.dumps({"load": load, "cores": os.cpu_count(), **results}))


if __name__ == "__main__":
    typer.run(main)
