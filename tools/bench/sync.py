"""How fast weights get from the actor into the engines; figures and goals are in docs/benchmarks.md.

    python -m tools.bench.sync [--megabytes 1000] [--repetitions 3] [--output bench.json] [--only TOPIC]

`export`: shards into buckets against Megatron-Bridge's export_hf_weights, on the same 4 ranks and model.
`sync`: all of a recipe's sync, two ranks to two engines, against memcpy; and where its time goes.
`update`: one engine given a random MoE in buckets of several sizes, tensor by tensor over HTTP, and memcpy.
Left out: NCCL, CUDA IPC, several machines.
"""

from __future__ import annotations

import base64
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from megatron_pmd import config as c
from megatron_pmd.errors import PmdError
from megatron_pmd.weight_sync.transport import ReadBy
from tools.bench.loop import Row, compared, machine, markdown, row

ROOT = Path(__file__).parents[2]
LAYOUTS = {"TP2 PP2": dict(tensor=2, pipeline=2), "EP2 TP2": dict(tensor=2, expert=2, data=2)}
BUCKETS_MB = (32, 128, 512)
TOPICS = ("export", "sync", "update")


def write_moe(folder: Path, megabytes: int) -> None:
    """A random Qwen3-MoE in bf16 of about this size: 32 experts a layer, 50 million parameters a layer."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    layers = max(2, 2 * round(megabytes / 2 / 106))
    model = Qwen3MoeConfig(
        vocab_size=4096, hidden_size=1024, num_hidden_layers=layers, num_attention_heads=8, head_dim=64,
        num_key_value_heads=4, intermediate_size=1024, moe_intermediate_size=512, num_experts=32,
        num_experts_per_tok=2, decoder_sparse_step=1, tie_word_embeddings=False, max_position_embeddings=512,
        rope_theta=1e6, norm_topk_prob=True, dtype="bfloat16", eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    Qwen3MoeForCausalLM(model).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)


def run_config(model: Path, layout: dict[str, int]) -> c.RunConfig:
    return c.RunConfig(
        name="bench", iterations=1, model=c.Model(path=str(model)), layout=c.Layout(**layout),
        batch=c.Batch(
            prompts_per_rollout=1, samples_per_prompt=1, prompts_per_step=1, max_tokens_per_microbatch=64,
            max_prompt_tokens=32, max_response_tokens=32,
        ),
        optimizer=c.Optimizer(learning_rate=1e-5), reward=c.Reward(name="exact"),
        data=c.Data(train=c.ReasoningGymSource(task="chain_sum", size=3)),
    )  # fmt: skip


def on_ranks(folder: Path, ranks: int, **task: Any) -> dict[str, Any]:
    """Run one of the programs below under torchrun; what its rank 0 has measured."""
    order = folder / "order.json"
    order.write_text(json.dumps(task))
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [sys.executable, *torchrun, "-m", "tools.bench.sync", "--ranks", str(order)]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return json.loads(order.with_suffix(".measured").read_text())


# export


def bench_export(model: Path, repetitions: int, folder: Path) -> list[Row]:
    """Both exports in turns; the first turn does not count: there Megatron-Bridge fills its caches."""
    rows = []
    for name, layout in LAYOUTS.items():
        seconds = on_ranks(
            folder, 4, program="export", model=str(model), layout=layout, turns=repetitions + 1
        )
        total = seconds["bytes"] / 1e9
        rows += compared(
            row(f"{name}: shards into buckets", [total / s for s in seconds["ours"][1:]], "GB/s"),
            row(f"{name}: export_hf_weights", [total / s for s in seconds["bridge"][1:]], "GB/s"),
            3.0,
        )
    return rows


class _Nowhere:
    """A transport without engines."""

    read_by: ReadBy = "engines"

    def begin(self) -> None: ...

    def load(self, bucket: Any, descriptions: Any) -> None: ...

    def end(self, version: int) -> None: ...

    def close(self) -> None: ...


def export_ranks(order: Path) -> None:
    """One of the four ranks; rank 0 writes the seconds of both exports, the slowest rank's."""
    from megatron_pmd.actor.cpu import standins

    standins.install()
    from megatron_pmd.actor import parallel
    from megatron_pmd.actor.actor import Actor
    from megatron_pmd.distributed import Control
    from megatron_pmd.observe.subphases import SubphaseClock
    from megatron_pmd.weight_sync.push import WeightPush
    from megatron_pmd.weight_sync.shards import ShardExport

    torch.set_num_threads(1)
    task = json.loads(order.read_text())
    config = run_config(Path(task["model"]), task["layout"])
    parallel.initialize(config.layout, seed=0, timeout_seconds=300)
    control = Control(300)
    actor = Actor(config, control)
    push = WeightPush(
        _Nowhere(),
        control,
        f"bench-{order.parent.name}",
        SubphaseClock(),
        bucket_bytes=config.sync.bucket_megabytes * 2**20,
        timeout_seconds=config.sync.timeout_seconds,
    )

    shards = ShardExport(actor.bridge, actor.chunks, control, actor.shapes)

    def ours() -> int:
        return push.push(shards, 1, serves=[control.rank] if control.is_driver else []).bytes

    def bridge() -> int:
        return sum(tensor.nbytes for _, tensor in actor.export())

    seconds: dict[str, Any] = {"ours": [], "bridge": []}
    for _ in range(task["turns"]):
        for name, side in (("ours", ours), ("bridge", bridge)):
            control.barrier()
            begun = time.perf_counter()
            seconds["bytes"] = side()
            seconds[name].append(max(control.all_gather(time.perf_counter() - begun)))
    if control.is_driver:
        order.with_suffix(".measured").write_text(json.dumps(seconds))
    push.close()


# sync


def bench_sync(model: Path, repetitions: int, folder: Path) -> list[Row]:
    """The recipe smollm2_135m_cpu; the first sync does not count: it makes plan and buckets."""
    measured = on_ranks(folder, 2, program="sync", run=str(folder / "run"), turns=3 * repetitions + 1)
    total = measured["bytes"]
    fresh, touched = memcpy(total, 3 * repetitions)
    ours = row(f"sync of {total / 1e6:,.0f} MB", [total / s / 1e9 for s in measured["sync"][1:]], "GB/s")
    rows = [fresh, *compared(ours, touched, 0.3)]
    rows.append({**ours, "what": "sync, against fresh pages", "ratio": ours["value"] / fresh["value"]})
    return [*rows, *(row(f"of it {name}", values[1:], "s") for name, values in measured["subphases"].items())]


def sync_ranks(order: Path) -> None:
    """One of two ranks with an engine each; weights and caches are handed over as in an iteration."""
    from megatron_pmd.actor.cpu import standins

    standins.install()
    from megatron_pmd.actor import parallel
    from megatron_pmd.actor.actor import Actor
    from megatron_pmd.distributed import Control
    from megatron_pmd.node.worker import prepare_model
    from megatron_pmd.observe.console import Console
    from megatron_pmd.observe.subphases import together
    from megatron_pmd.training.live_engines import LiveEngines
    from recipes import configuration

    torch.set_num_threads(1)
    task = json.loads(order.read_text())
    config = configuration("smollm2_135m_cpu", [])
    parallel.initialize(config.layout, seed=0, timeout_seconds=300)
    control = Control(300)
    control.on_driver(lambda: prepare_model(config))
    engines = LiveEngines(config, control, Path(task["run"]), None, None, Console(), cpu=True)
    seconds, subphases = [], dict[str, list[float]]()
    try:
        actor = Actor(config, control)
        for turn in range(task["turns"]):
            control.barrier()
            engines.clock.take()
            begun = time.perf_counter()
            report = engines.load(actor, turn)
            seconds.append(max(control.all_gather(time.perf_counter() - begun)))
            for line in together(control.all_gather(engines.clock.take())):
                subphases.setdefault(line["subphase"], []).append(line["seconds"])
            engines.resume()
            engines.release()
        if control.is_driver:
            measured = {"bytes": report.bytes, "sync": seconds, "subphases": subphases}
            order.with_suffix(".measured").write_text(json.dumps(measured))
    finally:
        engines.close()


# update


def bench_update(model: Path, repetitions: int, folder: Path) -> list[Row]:
    """One engine of one thread; every way loads all tensors and ends with a version."""
    from safetensors.torch import load_file

    from megatron_pmd.engine.control import EngineControl
    from megatron_pmd.engine.server import free_port
    from megatron_pmd.engine.sglang_server import EngineProcess, EngineSpec

    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(model.glob("*.safetensors")):
        tensors |= load_file(file)
    total = sum(t.nbytes for t in tensors.values()) / 1e9
    spec = EngineSpec(
        number=0, model=c.Model(path=str(model)), rollout=c.Rollout(max_total_tokens=256), port=free_port(),
        log=folder / "engine.log", seed=0, cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    torch.set_num_threads(1)
    engine = EngineProcess(spec)
    rates: dict[str, list[float]] = {}
    try:
        engine.wait_ready(300)
        with EngineControl(spec, 600) as control:
            ways: dict[str, Callable[[], None]] = {
                f"buckets of {size} MB": lambda size=size: _in_buckets(control, tensors, size)  # type: ignore[misc]
                for size in BUCKETS_MB
            }
            ways["a request for each tensor, by value"] = lambda: _by_value(control, tensors)
            for name, way in ways.items():
                # by value it takes a minute
                for turn in range(1 if "value" in name else repetitions + 1):
                    begun = time.perf_counter()
                    way()
                    if turn or "value" in name:
                        rates.setdefault(name, []).append(total / (time.perf_counter() - begun))
    finally:
        engine.stop()
    slow = row(
        "a request for each tensor, by value", rates.pop("a request for each tensor, by value"), "GB/s"
    )
    fresh, touched = memcpy(int(total * 1e9), 3 * repetitions)
    rows = [slow, fresh, touched]
    for name, values in rates.items():
        ours = row(f"{total * 1e3:,.0f} MB in {name}", values, "GB/s")
        for reference, goal in ((slow, "≥ 5"), (touched, "≥ 0.3"), (fresh, "")):
            ratio = ours["value"] / reference["value"]
            rows.append(
                {**ours, "what": f"{ours['what']}, beside {reference['what']}", "ratio": ratio, "goal": goal}
            )
    return rows


def memcpy(nbytes: int, repetitions: int) -> list[Row]:
    """numpy's copy of as many bytes, on one core: into pages never touched before, and into warm ones."""
    source, touched = np.ones(nbytes, np.uint8), np.ones(nbytes, np.uint8)
    rates: dict[str, list[float]] = {"fresh": [], "touched": []}
    for _ in range(repetitions):
        for kind, values in rates.items():
            target = touched if kind == "touched" else np.empty(nbytes, np.uint8)
            begun = time.perf_counter()
            np.copyto(target, source)
            values.append(nbytes / (time.perf_counter() - begun) / 1e9)
    return [row(f"memcpy into {kind} pages", values, "GB/s") for kind, values in rates.items()]


def _in_buckets(control: Any, tensors: dict[str, torch.Tensor], megabytes: int) -> None:
    """As WeightPush does with a rank that holds everything: one bucket is filled while one is loaded."""
    from concurrent.futures import ThreadPoolExecutor

    from megatron_pmd.weight_sync.plan import lay_out

    cut = lay_out(
        {n: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in tensors.items()},
        megabytes * 2**20,
    )
    layouts = [layout for [layout] in cut]
    buckets = _buckets(megabytes, layouts[0].capacity)
    with ThreadPoolExecutor(1) as pool:
        loading = None
        control.begin_update()
        for number, layout in enumerate(layouts):
            bucket = buckets[number % 2]
            bucket.layout = layout
            for name, entry in layout.entries.items():
                bucket.tensor(entry).copy_(tensors[name])
            description = bucket.description()
            if loading is not None:
                loading.result()
            loading = pool.submit(control.load_bucket, [description])
        assert loading is not None
        loading.result()
        control.end_update(1)


_made: dict[int, list[Any]] = {}


def _buckets(megabytes: int, capacity: int) -> list[Any]:
    """Made once for each size, as in a run."""
    from megatron_pmd.weight_sync.bucket import SharedBucket

    if megabytes not in _made:
        for old in _made.values():
            for bucket in old:
                bucket.close()
        _made.clear()
        _made[megabytes] = [SharedBucket(f"bench-{megabytes}-{turn}", capacity) for turn in range(2)]
    return _made[megabytes]


def _by_value(control: Any, tensors: dict[str, torch.Tensor]) -> None:
    """What SGLang documents for tensors on a CPU: each in a request of its own."""
    control.begin_update()
    for name, tensor in tensors.items():
        payload = base64.b64encode(pickle.dumps([(name, tensor)])).decode()
        request = {"serialized_named_tensors": [payload], "flush_cache": False}
        control._confirmed("/update_weights_from_tensor", request)
    control.end_update(1)


def main(
    megabytes: Annotated[int, typer.Option(help="of the random MoE, in bf16")] = 1000,
    repetitions: Annotated[int, typer.Option(min=1)] = 3,
    output: Annotated[Path, typer.Option(help="all figures as JSON")] = Path("bench.json"),
    only: Annotated[list[str] | None, typer.Option(help=f"some of {', '.join(TOPICS)}")] = None,
    ranks: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure, print Markdown tables, write JSON."""
    if ranks is not None:
        program = json.loads(ranks.read_text())["program"]
        {"export": export_ranks, "sync": sync_ranks}[program](ranks)
        torch.distributed.destroy_process_group()
        return
    if unknown := set(only or ()) - set(TOPICS):
        raise typer.BadParameter(f"--only {', '.join(unknown)}: choose from {', '.join(TOPICS)}")
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        write_moe(folder / "moe", megabytes)
        measures = {"export": bench_export, "sync": bench_sync, "update": bench_update}
        results: dict[str, Any] = {"machine": machine(), "megabytes": megabytes}
        for topic in only or TOPICS:
            results[topic] = measures[topic](folder / "moe", repetitions, folder)
            print(markdown(topic, results[topic]), flush=True)
            output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    try:
        typer.run(main)
    except PmdError as error:
        sys.exit(f"{type(error).__name__}: {error}")
