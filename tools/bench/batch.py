"""How fast a rollout gets from engines' responses to the ranks of a node; figures are in docs/benchmarks.md.

    python -m tools.bench.batch [--ranks 8] [--samples 8192] [--tokens 8192] [--only responses]

A synthetic rollout: 2,048 prompt tokens and the rest response, without recorded routing and with that of 48
layers and 8 experts of 128. `responses`: from the bodies of HTTP responses, as SGLang writes them, to each
rank's share, and then the rollout's file. `shares`: from samples to shares, through shared memory. `pickle`:
the whole batch is broadcast to every rank. Each way runs at several parts of the samples. Left out: the
sockets, the tokenizer, graders, and other nodes. Of five repetitions the one of least processor time counts;
memory is that of the first, which finds no pages of an earlier one.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import orjson
import torch.distributed as dist
import typer

from megatron_pmd.batch import RolloutBatch, Sample
from megatron_pmd.data.problems import Problem
from megatron_pmd.distributed import Control
from megatron_pmd.rollout.engine_answer import parse_answer, recorded_experts
from megatron_pmd.rollout.groups import DrawSettings, RolloutGroups
from megatron_pmd.rollout.trajectory import Turn
from megatron_pmd.rollout_file import write_rollout
from megatron_pmd.training.batch_shares import distribute
from tools.bench.loop import machine

ROOT = Path(__file__).parents[2]
PROMPT_TOKENS, GROUP_SIZE = 2048, 16
LAYERS, TOP_K, EXPERTS = 48, 8, 128
DISTINCT = 64
"""So many responses are made, and taken again and again: 8,192 others would fill the machine."""
REPETITIONS = 5
WAYS: dict[str, dict[str, tuple[float, ...]]] = {
    "responses": {"no": (0.03125, 0.125, 1.0), "48 × 8": (0.015625, 0.03125, 0.125)},
    "shares": {"no": (0.125, 0.25, 1.0), "48 × 8": (0.0625, 0.125, 0.25)},
    "pickle": {"no": (0.0625, 0.125), "48 × 8": (0.0078125,)},
}
"""Way -> recorded routing -> fractions of the samples, so that none takes more than 8 GB."""


@dataclass(frozen=True)
class Responses:
    """A rollout as the engines answer it: so many responses, whose bodies repeat."""

    count: int
    tokens: int
    routing: bool
    bodies: list[bytes]

    @classmethod
    def make(cls, count: int, tokens: int, routing: bool) -> Responses:
        rng = np.random.default_rng(0)
        bodies = [_body(rng, tokens, routing) for _ in range(min(DISTINCT, count))]
        return cls(count, tokens, routing, bodies)

    def samples(self) -> list[Sample]:
        """What the driver makes of them: rollout/episode.py without the requests and the tokenizer."""
        groups = -(-self.count // GROUP_SIZE)
        problems = [Problem(i, (), "", tokens=tuple(range(PROMPT_TOKENS))) for i in range(groups)]
        rollout = RolloutGroups(problems, DrawSettings(GROUP_SIZE, 0, 0, 1.0, 1.0, run_seed=0))
        members = [member for group in rollout.groups for member in group.members]
        for number, member in enumerate(members):
            answer, turn = parse_answer(self.bodies[number % len(self.bodies)]), Turn()
            turn.extend(answer.tokens, answer.log_probs, 0)
            if answer.routed_experts is not None:
                member.routed_experts = recorded_experts(answer.routed_experts, self.tokens, LAYERS * TOP_K)
            turn.finish, member.turns, member.reward = "stop", [turn], 0.0
        return rollout.samples(WithoutText())


class WithoutText:
    """A tokenizer that costs nothing: it is not what is measured."""

    def decode(self, tokens: Any, **_: Any) -> str:
        return ""


def _body(rng: np.random.Generator, tokens: int, routing: bool) -> bytes:
    """The JSON of SGLang's /generate; the experts as engines with plugins/ send them."""
    response = tokens - PROMPT_TOKENS
    ids = rng.integers(0, 150_000, response).tolist()
    log_probs = (-rng.exponential(0.5, response)).astype(np.float32).tolist()
    information: dict[str, Any] = {
        "id": "0" * 32, "finish_reason": {"type": "stop", "matched": 2}, "weight_version": "0",
        "output_token_logprobs": [[p, t, None] for p, t in zip(log_probs, ids, strict=True)],
    }  # fmt: skip
    if routing:
        experts = rng.integers(0, EXPERTS, (tokens - 1) * LAYERS * TOP_K, np.uint8)
        information["routed_experts"] = base64.b64encode(experts.tobytes()).decode()
    return orjson.dumps({"output_ids": ids, "meta_info": information})


def resident_gigabytes(field: str) -> float:
    """From the kernel's account of this process; memory shared with others included."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024 / 1e9
    raise KeyError(field)


def by_responses(responses: Responses | None, control: Control) -> RolloutBatch:
    return by_shares(responses.samples() if responses else [], control)


def by_shares(samples: list[Sample], control: Control) -> RolloutBatch:
    described = RolloutBatch.describe(samples, 1.0) if control.is_driver else None
    return distribute(
        described, samples, lambda batch: np.arange(control.rank, len(batch), control.world), control
    )


def by_pickle(samples: list[Sample], control: Control) -> RolloutBatch:
    return control.from_driver(RolloutBatch.pack(samples, 1.0) if control.is_driver else None)


def measure(way: Callable[..., RolloutBatch], rollout: Any, control: Control) -> dict[str, float]:
    """On the driver: seconds, and by how many GB the processes grew, until all had the batch.

    processor_s is of all ranks together; reading_s is what all of them take to read their samples once.
    """
    Path("/proc/self/clear_refs").write_text("5")  # the kernel forgets the peak so far
    before = resident_gigabytes("VmRSS")
    control.barrier()
    start, busy = time.perf_counter(), time.process_time()
    batch = way(rollout, control)
    busy = time.process_time() - busy
    control.barrier()
    arrived = time.perf_counter()
    grew = resident_gigabytes("VmHWM") - before
    for number in range(control.rank, len(batch), control.world):
        place = slice(*batch.tokens.offsets[number : number + 2].tolist())
        columns = batch.tokens
        for array in (columns.ids, columns.engine_log_probs, columns.counted, columns.routed_experts):
            if array is not None:
                array[place].max()
    control.barrier()
    read = time.perf_counter()
    ranks, processor_seconds = control.gather(grew), control.gather(busy)
    if ranks is None or processor_seconds is None:
        return {}
    gigabytes = batch.share_bytes(np.arange(len(batch))) / 1e9
    return {
        "GB": gigabytes, "arrival_s": arrived - start, "processor_s": sum(processor_seconds),
        "reading_s": read - arrived, "driver_GB": ranks[0], "rank_GB": max(ranks[1:], default=0.0),
        "all_GB": sum(ranks),
    }  # fmt: skip


def write_file(responses: Responses, path: Path) -> dict[str, float]:
    """Seconds of one core that the thread beside training takes, and the file's size."""
    samples = responses.samples()
    busy = time.process_time()
    write_rollout(path, samples, 0)
    return {"file_s": time.process_time() - busy, "file_GB": path.stat().st_size / 1e9}


def on_rank(order: Path) -> None:
    """One rank of a run of one way; the driver writes what it has measured beside the order."""
    task = json.loads(order.read_text())
    dist.init_process_group("gloo")
    control = Control(600)
    ways: dict[str, Callable[..., RolloutBatch]] = {
        "responses": by_responses, "shares": by_shares, "pickle": by_pickle,
    }  # fmt: skip
    way = ways[task["way"]]
    rows = []
    for fraction in task["fractions"]:
        count = int(task["samples"] * fraction)
        rollout: Any = None
        if control.is_driver:
            rollout = Responses.make(count, task["tokens"], task["routing"] != "no")
            rollout = rollout if task["way"] == "responses" else rollout.samples()
        # other programs only ever make a run slower
        measured = [measure(way, rollout, control) for _ in range(REPETITIONS)]
        best = min(measured, key=lambda row: row.get("processor_s", 0.0))
        grown = {key: measured[0].get(key) for key in ("driver_GB", "rank_GB", "all_GB")}
        rows.append({"samples": count, **best, **grown})
        if control.is_driver and task["way"] == "responses":
            rows[-1] |= write_file(rollout, order.with_suffix(".parquet"))
        control.barrier()
    if control.is_driver:
        order.with_suffix(".measured").write_text(json.dumps(rows))
    dist.destroy_process_group()


def main(
    ranks: Annotated[int, typer.Option(min=2)] = 8,
    samples: int = 8192,
    tokens: int = 8192,
    only: Annotated[str | None, typer.Option(help=f"of {', '.join(WAYS)}; all")] = None,
    output: Path | None = None,
) -> None:
    rows, described = [], machine()
    for way, fractions_by_routing in WAYS.items():
        if only not in (None, way):
            continue
        for routing, fractions in fractions_by_routing.items():
            with tempfile.TemporaryDirectory() as folder:
                order = Path(folder) / "order.json"
                task = dict(way=way, routing=routing, fractions=fractions, samples=samples, tokens=tokens)
                order.write_text(json.dumps(task))
                torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
                subprocess.run(
                    [sys.executable, *torchrun, "-m", "tools.bench.batch", "--rank", str(order)],
                    check=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
                )  # fmt: skip
                measured = json.loads(order.with_suffix(".measured").read_text())
            rows += [{"way": way, "routing": routing, **row} for row in measured]
            for row in rows[-len(measured) :]:
                print({k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    if output is not None:
        output.write_text(json.dumps({"machine": described, "ranks": ranks, "rows": rows}, indent=1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        on_rank(Path(sys.argv[2]))
    else:
        typer.run(main)
