"""Conversion speed and memory: both directions, 1 and 2 processes, beside `cp` and Megatron-Bridge alone.

    python -m tools.bench.convert --gigabytes 2 --folder SCRATCH

Makes a random Qwen3-MoE in bf16 of about that size, one file a gigabyte, and runs every side in processes of
its own, in turns; each reads a warm page cache and has its bytes on disk when its clock stops. Speeds are in
GB/s of the model's bytes: over the whole command, imports included; over the conversion alone; and over the
processor's seconds of the conversion alone, which other work on the machine hardly changes. Memory is the
largest proportional set size (mapped files counted, shared pages once), sampled 10 times a second.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

SHARD_GIGABYTES = 1.0
SIDES = ("cp", "ours, 1 process", "ours, 2 processes", "Megatron-Bridge")


def make_model(folder: Path, gigabytes: float) -> None:
    """Random weights; layers of 64 experts of 0.4 GB each, as many as the size takes."""
    from transformers import Qwen3MoeConfig

    from megatron_pmd.hugging_face import ShardWriter, write_index

    hidden, expert, experts = 1024, 1024, 64
    layer = experts * 3 * hidden * expert * 2
    config = Qwen3MoeConfig(
        vocab_size=32_000, hidden_size=hidden, intermediate_size=2 * hidden, moe_intermediate_size=expert,
        num_hidden_layers=max(1, round(gigabytes * 1e9 / layer)), num_attention_heads=16,
        num_key_value_heads=4, head_dim=64, num_experts=experts, num_experts_per_tok=4,
        tie_word_embeddings=False, architectures=["Qwen3MoeForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(folder)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (32_000, hidden)}
    for i in range(config.num_hidden_layers):
        at = f"model.layers.{i}."
        shapes |= {
            f"{at}input_layernorm.weight": (hidden,), f"{at}post_attention_layernorm.weight": (hidden,),
            f"{at}self_attn.q_proj.weight": (1024, hidden), f"{at}self_attn.k_proj.weight": (256, hidden),
            f"{at}self_attn.v_proj.weight": (256, hidden), f"{at}self_attn.o_proj.weight": (hidden, 1024),
            f"{at}self_attn.q_norm.weight": (64,), f"{at}self_attn.k_norm.weight": (64,),
            f"{at}mlp.gate.weight": (experts, hidden),
        }  # fmt: skip
        for e in range(experts):
            one = f"{at}mlp.experts.{e}."
            shapes |= {f"{one}{name}_proj.weight": (expert, hidden) for name in ("gate", "up")}
            shapes[f"{one}down_proj.weight"] = (hidden, expert)
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (32_000, hidden)}
    files: list[list[str]] = [[]]
    size = 0.0
    for name, shape in shapes.items():
        if size > SHARD_GIGABYTES * 1e9:
            files.append([])
            size = 0.0
        files[-1].append(name)
        size += torch.Size(shape).numel() * 2
    where, total = {}, 0
    for i, names in enumerate(files):
        file = f"model-{i + 1:05}-of-{len(files):05}.safetensors"
        with ShardWriter(folder / file, names) as shard:
            for name in names:
                shard.add(name, torch.randn(shapes[name], dtype=torch.bfloat16))
                where[name] = file
        total += shard.bytes
    write_index(folder, where, total)


class Clock:
    """Seconds of the wall, and of the processors for this process and its children, since it was made."""

    def __init__(self) -> None:
        self._began, self._processor = time.perf_counter(), processor_seconds()

    def tell(self) -> None:
        print(
            f"seconds {time.perf_counter() - self._began} {processor_seconds() - self._processor}", flush=True
        )


def processor_seconds() -> float:
    return sum(os.times()[:4])


def bridge_alone(direction: str, source: str, out: str, config_folder: str) -> None:
    """What one writes with Megatron-Bridge: the model whole in memory, its import or export, a checkpoint."""
    from megatron_pmd.convert.session import ranks

    with ranks():
        from megatron.core import dist_checkpointing, parallel_state

        from megatron_pmd.actor.model import load_bridge
        from megatron_pmd.actor.parameters import build_whole

        clock = Clock()
        bridge = load_bridge(Path(config_folder))
        module = build_whole(bridge, dtype=torch.bfloat16)
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        if direction == "to-megatron":
            bridge.load_hf_weights([module])
            Path(out).mkdir()
            dist_checkpointing.save(module.sharded_state_dict(metadata={"dp_cp_group": group}), out)
        else:
            state = module.sharded_state_dict(metadata={"dp_cp_group": group})
            # Transformer Engine's objects: our checkpoint has none of them
            state = {key: value for key, value in state.items() if not key.endswith("_extra_state")}
            module.load_state_dict(dist_checkpointing.load(state, source), strict=False)
            bridge.save_hf_pretrained([module], out, show_progress=False)
        os.sync()
        clock.tell()


def ours(direction: str, source: str, out: str) -> None:
    """Our conversion, with the clock of the conversion alone."""
    from megatron_pmd.convert.session import ranks

    with ranks() as control:
        from megatron_pmd.convert.to_hugging_face import megatron_to_hf
        from megatron_pmd.convert.to_megatron import hf_to_megatron

        clock = Clock()
        size = int(SHARD_GIGABYTES * 1e9)
        if direction == "to-megatron":
            hf_to_megatron(Path(source), Path(out), control, part_bytes=size)
        else:
            megatron_to_hf(Path(source), Path(source) / "hf", Path(out), control, shard_bytes=size)
        control.barrier()
        clock.tell()


def command(side: str, direction: str, source: Path, out: Path, model: Path) -> list[str]:
    if side == "cp":
        return ["sh", "-c", f"cp -r {source} {out} && sync"]
    module = [sys.executable, "-m"]
    if side == "ours, 2 processes":
        module = [*module, "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    kind = "bridge" if side == "Megatron-Bridge" else "ours"
    return [*module, "tools.bench.convert", "--side", kind, direction, str(source), str(out), str(model)]


def measure(words: list[str], log: Path) -> tuple[float, float, float, float]:
    """Seconds of the command, of the conversion, the processors' of it; peak memory of all processes."""
    began, processor, peak = time.perf_counter(), processor_seconds(), 0
    with log.open("w+") as output:
        process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT)
        tree = psutil.Process(process.pid)
        while process.poll() is None:
            peak = max(peak, memory_bytes(tree))
            time.sleep(0.1)
        whole = time.perf_counter() - began
        output.seek(0)
        text = output.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {process.returncode}:\n{text[-2000:]}")
    own = processor_seconds() - processor  # this process adds little: it sleeps
    told = [line.split("seconds ")[1].split() for line in text.splitlines() if "seconds " in line]
    if not told:
        return whole, whole, own, peak
    return whole, max(float(t[0]) for t in told), sum(float(t[1]) for t in told), peak


def memory_bytes(tree: psutil.Process) -> int:
    total = 0
    for process in [tree, *tree.children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:  # it has ended
            continue
    return total


def bench(folder: Path, gigabytes: float, repetitions: int, directions: list[str]) -> dict[str, object]:
    model, checkpoint, out = folder / "model", folder / "checkpoint", folder / "out"
    if not model.exists():
        model.mkdir(parents=True)
        make_model(model, gigabytes)
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    if not checkpoint.exists():
        measure(command("ours, 1 process", "to-megatron", model, checkpoint, model), folder / "output")
    rows = []
    for direction, source in (("to-megatron", model), ("to-hf", checkpoint)):
        if direction not in directions:
            continue
        found: dict[str, list[tuple[float, float, float, float]]] = {side: [] for side in SIDES}
        for _ in range(repetitions):
            for side in SIDES:
                words = command(side, direction, source, out, model)
                found[side].append(measure(words, folder / "output"))
                shutil.rmtree(out)
        for side, runs in found.items():
            *seconds, peak = (statistics.median(run[i] for run in runs) for i in range(4))
            row = [size / second / 1e9 for second in seconds] + [peak / 1e9]
            rows.append([direction, side, *row])
            print(
                direction,
                side,
                "GB/s {:.3f}, alone {:.3f}, by processor {:.3f}; {:.2f} GB".format(*row),
                flush=True,
            )
    return {
        "model_gigabytes": size / 1e9, "shard_gigabytes": SHARD_GIGABYTES, "repetitions": repetitions,
        "machine": platform.processor() or platform.machine(), "cores": os.cpu_count(),
        "load": os.getloadavg(), "torch": torch.__version__, "rows": rows,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--repetitions", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="scratch, with four times the model's size free")
    parser.add_argument("--only", choices=("to-megatron", "to-hf"), help="one direction; both without it")
    parser.add_argument("--side", nargs=5, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.side:
        kind, *rest = asked.side
        side: Callable[..., None] = bridge_alone if kind == "bridge" else ours
        side(*(rest if kind == "bridge" else rest[:3]))
    elif asked.folder is None:
        parser.error("--folder is needed")
    else:
        directions = [asked.only] if asked.only else ["to-megatron", "to-hf"]
        print(json.dumps(bench(asked.folder, asked.gigabytes, asked.repetitions, directions), indent=1))


if __name__ == "__main__":
    main()
