"""How fast a rollout gets from the driver to the ranks of a node; figures are in docs/benchmarks.md.

    python -m tools.bench.batch [--ranks 8] [--samples 8192] [--tokens 8192] [--output bench.json]

A synthetic rollout: 2,048 prompt tokens and the rest response, without recorded routing and with that of 48
layers and 8 experts of 128. `shares`: each rank gets its own, through shared memory. `pickle`: the whole
batch is broadcast to every rank. Each way runs at several parts of the samples. Left out: other nodes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import torch.distributed as dist
import typer

from megatron_pmd.batch import RolloutBatch, Sample
from megatron_pmd.distributed import Control
from megatron_pmd.training.batch_shares import distribute
from tools.bench.loop import machine

ROOT = Path(__file__).parents[2]
PROMPT_TOKENS = 2048
LAYERS, TOP_K, EXPERTS = 48, 8, 128
DISTINCT = 64
"""So many samples are made, and taken again and again: the lists of 8,192 others would fill the machine."""
WAYS: dict[str, dict[str, tuple[float, ...]]] = {
    "shares": {"no": (0.125, 0.25, 1.0), "48 × 8": (0.0625, 0.125, 0.25)},
    "pickle": {"no": (0.0625, 0.125), "48 × 8": (0.0078125,)},
}
"""Way -> recorded routing -> fractions of the samples, so that none takes more than 8 GB."""


def rollout(samples: int, tokens: int, routing: bool) -> list[Sample]:
    rng = np.random.default_rng(0)
    response = tokens - PROMPT_TOKENS
    made = [
        Sample(
            group=i // 16, number=i % 16, problem=i, prompt="", response="", answer="",
            prompt_tokens=rng.integers(0, 150_000, PROMPT_TOKENS).tolist(),
            response_tokens=rng.integers(0, 150_000, response).tolist(),
            engine_log_probs=(-rng.random(response)).tolist(), finish_reason="stop", weight_version=0, seed=0,
            routed_experts=rng.integers(0, EXPERTS, (tokens - 1) * LAYERS * TOP_K, np.uint16).tobytes()
            if routing else None,
        )
        for i in range(min(DISTINCT, samples))
    ]  # fmt: skip
    return [made[i % len(made)] for i in range(samples)]


def resident_gigabytes(field: str) -> float:
    """From the kernel's account of this process; memory shared with others included."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024 / 1e9
    raise KeyError(field)


def by_shares(samples: list[Sample], control: Control) -> RolloutBatch:
    described = RolloutBatch.describe(samples, 1.0) if control.is_driver else None
    return distribute(
        described, samples, lambda batch: np.arange(control.rank, len(batch), control.world), control
    )


def by_pickle(samples: list[Sample], control: Control) -> RolloutBatch:
    return control.from_driver(RolloutBatch.pack(samples, 1.0) if control.is_driver else None)


def measure(way: Callable[..., RolloutBatch], samples: list[Sample], control: Control) -> dict[str, float]:
    """On the driver: seconds, and by how many GB the processes grew, until all had the batch.

    processor_s is of all ranks together; reading_s is what all of them take to read their samples once.
    """
    Path("/proc/self/clear_refs").write_text("5")  # the kernel forgets the peak so far
    before = resident_gigabytes("VmRSS")
    control.barrier()
    start, busy = time.perf_counter(), time.process_time()
    batch = way(samples, control)
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


def on_rank(order: Path) -> None:
    """One rank of a run of one way; the driver writes what it has measured beside the order."""
    task = json.loads(order.read_text())
    dist.init_process_group("gloo")
    control = Control(600)
    way = {"shares": by_shares, "pickle": by_pickle}[task["way"]]
    rows = []
    for fraction in task["fractions"]:
        count = int(task["samples"] * fraction)
        samples = rollout(count, task["tokens"], task["routing"] != "no") if control.is_driver else []
        rows.append({"samples": count, **measure(way, samples, control)})
    if control.is_driver:
        order.with_suffix(".measured").write_text(json.dumps(rows))
    dist.destroy_process_group()


def main(
    ranks: Annotated[int, typer.Option(min=2)] = 8,
    samples: int = 8192,
    tokens: int = 8192,
    output: Path | None = None,
) -> None:
    rows, described = [], machine()
    for way, fractions_by_routing in WAYS.items():
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
