"""Merged weights in an engine beside SGLang's own adapters: what a sync costs, and what a decoded token.

    python -m tools.bench.adapters models/smollm2-135m-instruct [--rank 32] [--repetitions 3]

Two engines of one thread, one after the other. One gets merged weights through buckets, as a run's engines
do. The other gets random adapters of the same layers by load_lora_adapter_from_tensors, whose backend is
torch_native.
Left out: GPUs, several adapters at a time, mixtures of experts.
"""

from __future__ import annotations

import base64
import json
import pickle
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import httpx
import torch
import typer

from megatron_pmd import config as c
from megatron_pmd.engine.control import EngineControl
from megatron_pmd.engine.server import free_port
from megatron_pmd.engine.sglang_server import EngineProcess, EngineSpec
from megatron_pmd.errors import PmdError
from tools.bench.loop import Row, machine, markdown, row
from tools.bench.sync import _in_buckets

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NAME = "adapters"
BUCKET_MB = 128
ANSWER_SECONDS = 600


def adapters_of(tensors: dict[str, torch.Tensor], rank: int) -> dict[str, torch.Tensor]:
    """Random matrices A and B, bf16, by the names that peft gives them."""
    found = {}
    for name, weight in tensors.items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in TARGETS:
            rows, columns = weight.shape
            sizes = {"A": (rank, columns), "B": (rows, rank)}
            for letter, size in sizes.items():
                found[f"base_model.model.{module}.lora_{letter}.weight"] = 0.01 * torch.randn(size).bfloat16()
    return found


def merged(tensors: dict[str, torch.Tensor], adapters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights with 2 · B A added, as megatron_pmd/weight_sync/adapters.py adds it."""
    result = dict(tensors)
    for name, a in adapters.items():
        if name.endswith("lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            added = 2 * adapters[name.replace("lora_A", "lora_B")].float() @ a.float()
            weight = tensors[f"{module}.weight"]
            result[f"{module}.weight"] = (weight.float() + added).to(weight.dtype)
    return result


def seconds_of(work: Callable[[], object], repetitions: int) -> list[float]:
    """The first time does not count."""
    taken = []
    for turn in range(repetitions + 1):
        begun = time.perf_counter()
        work()
        if turn:
            taken.append(time.perf_counter() - begun)
    return taken


def bench(model: Path, rank: int, requests: int, tokens: int, repetitions: int, folder: Path) -> list[Row]:
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(model.glob("*.safetensors")):
        tensors |= load_file(file)
    adapters = adapters_of(tensors, rank)
    body: dict[str, Any] = {
        "input_ids": [list(range(100 + i, 150 + i)) for i in range(requests)],
        "sampling_params": {"max_new_tokens": tokens, "ignore_eos": True, "temperature": 1.0},
    }
    on = {
        "enable_lora": True, "max_lora_rank": rank, "lora_target_modules": list(TARGETS),
        "lora_backend": "torch_native", "max_loras_per_batch": 2,
    }  # fmt: skip
    rows = []
    for options in ({}, on):
        spec = EngineSpec(
            number=0, model=c.Model(path=str(model)), port=free_port(), log=folder / "engine.log", seed=0,
            rollout=c.Rollout(max_total_tokens=16384, max_running_requests=64, sglang=options),
            cpu=not torch.cuda.is_available(), load_model_weights=True,
        )  # fmt: skip
        engine = EngineProcess(spec)

        def post(path: str, content: dict[str, Any], url: str = spec.url) -> None:
            answer = httpx.post(url + path, json=content, timeout=ANSWER_SECONDS, trust_env=False)
            answer.raise_for_status()

        def load_adapters(post: Callable[..., None] = post) -> None:
            post("/unload_lora_adapter", {"lora_name": NAME})
            load(post, adapters, rank)

        try:
            engine.wait_ready(ANSWER_SECONDS)
            if options:
                load(post, adapters, rank)
                ways = {"adapters": {"lora_path": [NAME] * requests}, "adapters on, none chosen": {}}
                sync, moved = seconds_of(load_adapters, repetitions), adapters
            else:
                ways = {"merged": {}}
                with EngineControl(spec, ANSWER_SECONDS) as control:
                    sync = seconds_of(
                        lambda control=control: _in_buckets(control, merged(tensors, adapters), BUCKET_MB),
                        repetitions,
                    )
                moved = tensors
            name, size = next(iter(ways)), sum(tensor.nbytes for tensor in moved.values()) / 1e6
            rows.append(row(f"{name}: a sync of {size:,.0f} MB", sync, "s"))
            for way, more in ways.items():
                taken = seconds_of(lambda more=more, post=post: post("/generate", body | more), repetitions)
                rates = [requests * tokens / seconds for seconds in taken]
                rows.append(row(f"{way}: {requests} requests of {tokens} tokens", rates, "tokens/s"))
        finally:
            engine.stop()
    return rows


def load(post: Callable[..., None], adapters: dict[str, torch.Tensor], rank: int) -> None:
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": list(TARGETS)}
    payload = base64.b64encode(pickle.dumps(adapters)).decode()
    content = {"lora_name": NAME, "config_dict": settings, "serialized_named_tensors": [payload]}
    post("/load_lora_adapter_from_tensors", content)


def main(
    model: Annotated[Path, typer.Argument(help="a dense Hugging Face folder")],
    rank: Annotated[int, typer.Option(min=1)] = 32,
    requests: Annotated[int, typer.Option(min=1)] = 32,
    tokens: Annotated[int, typer.Option(min=1, help="of each response")] = 32,
    repetitions: Annotated[int, typer.Option(min=1)] = 3,
    output: Annotated[Path, typer.Option(help="all figures as JSON")] = Path("bench.json"),
) -> None:
    """Measure, print a Markdown table, write JSON."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        rows = bench(model, rank, requests, tokens, repetitions, Path(folder))
    print(markdown("adapters", rows), flush=True)
    output.write_text(json.dumps({"machine": machine(), "rank": rank, "adapters": rows}, indent=2) + "\n")


if __name__ == "__main__":
    try:
        typer.run(main)
    except PmdError as error:
        sys.exit(f"{type(error).__name__}: {error}")
