"""Merged weights in an engine beside adapters that SGLang serves: a sync, prefill and decoding, in turns.

    python -m tools.bench.lora models/smollm2-135m-instruct [--rank 32] [--repetitions 3] [--as-it-is]

Two engines of one thread, of which one works at a time. One gets merged weights in buckets, as a run's
engines do. The other gets the same adapters by load_lora_adapter_from_tensors, and serves them with SGLang's
backend `torch_native`. Both compute the log-probabilities of the same tokens, so an adapter that does nothing
would show. Seconds are those of a processor, of this process and the engine's: other work on the machine
hardly changes them.

SGLang 0.5.23 asks for page-locked memory wherever it handles adapters, and torch has none without a GPU:
its adapters do not run on a CPU. With --as-it-is the benchmark says so and stops. Otherwise a plugin in the
engines gives them ordinary memory. It is a stand-in of this benchmark alone: no run uses it.
Left out: GPUs and their kernels, several adapters at a time, adapters of experts.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import httpx
import psutil
import torch
import typer

from megatron_pmd import config as c
from megatron_pmd.engine.control import EngineControl, pickled_by_value
from megatron_pmd.engine.server import free_port
from megatron_pmd.engine.sglang_server import EngineProcess, EngineSpec
from megatron_pmd.errors import PmdError
from tools.bench.loop import Row, machine, markdown, row
from tools.bench.sync import _in_buckets

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NAME = "adapters"
BUCKET_MB = 128
PROMPT_TOKENS, PREFILL_TOKENS = 8, 64
PLUGIN = """\
import torch


def register():
    tensor, zeros = torch.tensor, torch.zeros
    torch.Tensor.pin_memory = lambda self, *_: self
    torch.tensor = lambda *arguments, pin_memory=False, **rest: tensor(*arguments, **rest)
    torch.zeros = lambda *arguments, pin_memory=False, **rest: zeros(*arguments, **rest)
"""


@contextlib.contextmanager
def ordinary_memory(folder: Path) -> Iterator[None]:
    """Engines started meanwhile get ordinary memory where SGLang asks for page-locked."""
    described = folder / "bench_memory-0.0.1.dist-info"
    described.mkdir(parents=True)
    (folder / "bench_memory.py").write_text(PLUGIN)
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: bench-memory\nVersion: 0.0.1\n")
    entry = "[sglang.srt.plugins]\nordinary_memory = bench_memory:register\n"
    (described / "entry_points.txt").write_text(entry)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(p for p in (str(folder), before) if p)
    try:
        yield
    finally:
        os.environ["PYTHONPATH"] = before or ""


def adapters_of(tensors: dict[str, torch.Tensor], rank: int) -> dict[str, torch.Tensor]:
    """Random matrices A and B, bf16, by the names that peft gives them."""
    found = {}
    for name, weight in tensors.items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in TARGETS:
            rows, columns = weight.shape
            for letter, size in {"A": (rank, columns), "B": (rows, rank)}.items():
                found[f"base_model.model.{module}.lora_{letter}.weight"] = 0.03 * torch.randn(size).bfloat16()
    return found


def merged(tensors: dict[str, torch.Tensor], adapters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights with 2 · B A added, as megatron_pmd/weight_sync/adapters.py adds it."""
    result = dict(tensors)
    for name, a in adapters.items():
        if name.endswith("lora_A.weight"):
            weight = name.removeprefix("base_model.model.").replace("lora_A.", "")
            added = 2 * adapters[name.replace("lora_A", "lora_B")].float() @ a.float()
            result[weight] = (tensors[weight].float() + added).to(tensors[weight].dtype)
    return result


class Side:
    """An engine, and how it gets what the actor has trained."""

    def __init__(self, name: str, number: int, model: Path, folder: Path, options: dict[str, Any]) -> None:
        self.name, self.chosen = name, dict[str, Any]()
        self.measured: dict[str, list[float]] = {}
        spec = EngineSpec(
            number=number, model=c.Model(path=str(model)), port=free_port(), seed=0,
            log=folder / f"engine-{number}.log", cpu=not torch.cuda.is_available(), load_model_weights=True,
            rollout=c.Rollout(max_total_tokens=16384, max_running_requests=64, sglang=options),
        )  # fmt: skip
        self.engine, self.control = EngineProcess(spec), EngineControl(spec, 600)

    def sync(self, tensors: dict[str, torch.Tensor], adapters: dict[str, torch.Tensor]) -> int:
        """Bytes moved; the base is `tensors`."""
        weights = merged(tensors, adapters)
        _in_buckets(self.control, weights, BUCKET_MB)
        return sum(tensor.nbytes for tensor in weights.values())

    def generate(self, prompts: list[list[int]], tokens: int, **more: Any) -> list[dict[str, Any]]:
        sampling = {"max_new_tokens": tokens, "ignore_eos": True, "temperature": 1.0}
        body = {"input_ids": prompts, "sampling_params": sampling, **self.chosen, **more}
        url = self.control.spec.url + "/generate"
        answer = httpx.post(url, json=body, timeout=600, trust_env=False)
        answer.raise_for_status()
        return answer.json()

    def log_probs(self, prompts: list[list[int]]) -> torch.Tensor:
        """Of each token but the first, given those before it."""
        answers = self.generate(prompts, 1, return_logprob=True, logprob_start_len=0)
        found = [answer["meta_info"]["input_token_logprobs"][1:] for answer in answers]
        return torch.tensor([[each[0] for each in one] for one in found])

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        begun = self._processor_seconds()
        yield
        self.measured.setdefault(what, []).append(self._processor_seconds() - begun)

    def _processor_seconds(self) -> float:
        engine = psutil.Process(self.engine.pid).children(recursive=True)
        return sum(sum(process.cpu_times()[:2]) for process in (psutil.Process(), *engine))

    def close(self) -> None:
        self.control.close()
        self.engine.stop()


class Served(Side):
    """The weights stay as in the model's folder, and requests name the adapters."""

    def sync(self, tensors: dict[str, torch.Tensor], adapters: dict[str, torch.Tensor]) -> int:
        if self.chosen:
            self.control._confirmed("/unload_lora_adapter", {"lora_name": NAME})
        rank = min(next(iter(adapters.values())).shape)
        settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": list(TARGETS)}
        payload = base64.b64encode(pickled_by_value(adapters)).decode()
        request = {"lora_name": NAME, "config_dict": settings, "serialized_named_tensors": [payload]}
        self.control._confirmed("/load_lora_adapter_from_tensors", request)
        self.chosen = {"lora_path": NAME}
        return sum(tensor.nbytes for tensor in adapters.values())


def bench(model: Path, rank: int, requests: int, tokens: int, turns: int, folder: Path) -> list[Row]:
    """A sync before the turns does not count."""
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(model.glob("*.safetensors")):
        tensors |= load_file(file)
    torch.manual_seed(0)
    adapters = adapters_of(tensors, rank)
    options = {
        "enable_lora": True, "max_lora_rank": rank, "lora_target_modules": list(TARGETS),
        "lora_backend": "torch_native", "max_loras_per_batch": 2,
    }  # fmt: skip
    with contextlib.ExitStack() as cleanup:
        sides: list[Side] = []
        for kind, name, own in ((Side, "merged", {}), (Served, "served adapters", options)):
            sides.append(kind(name, len(sides), model, folder, own))
            cleanup.callback(sides[-1].close)
        for side in sides:
            side.engine.wait_ready(600)
        compared = prompts(requests, PREFILL_TOKENS, seed=0)
        base = sides[0].log_probs(compared)
        moved = [side.sync(tensors, adapters) for side in sides]
        found = [side.log_probs(compared) for side in sides]
        for turn in range(turns):
            short, long = (prompts(requests, n, seed=turn + 1) for n in (PROMPT_TOKENS, PREFILL_TOKENS))
            for side in sides[:: 1 if turn % 2 else -1]:
                with side.timed("sync"):
                    side.sync(tensors, adapters)
                with side.timed("prefill"):
                    side.generate(long, 1)
                with side.timed("decoding"):
                    side.generate(short, tokens)
    work = {"prefill": requests * PREFILL_TOKENS, "decoding": requests * tokens}
    rows = table(sides, moved, work)
    for what, other in {"the base": base, "served adapters": found[1]}.items():
        difference = float((found[0] - other).abs().mean())
        rows.append(row(f"log-probabilities, merged weights from {what}: mean", [difference], "nats"))
    return rows


def prompts(count: int, tokens: int, seed: int) -> list[list[int]]:
    """Random ones, which no cache has seen."""
    return torch.randint(1000, 20000, (count, tokens), generator=torch.Generator().manual_seed(seed)).tolist()


def table(sides: list[Side], moved: list[int], work: dict[str, int]) -> list[Row]:
    """Each figure of merged weights, then the other side's with its ratio to that."""
    rows: list[Row] = []
    for what in ("sync", *work):
        own: list[Row] = []
        for side, size in zip(sides, moved, strict=True):
            seconds = side.measured[what]
            if what == "sync":
                own.append(row(f"sync of {size / 1e6:,.1f} MB, {side.name}", seconds, "s"))
            else:
                rates = [work[what] / each for each in seconds]
                own.append(row(f"{what} of {work[what]:,} tokens, {side.name}", rates, "tokens/s"))
        rows += [own[0], own[1] | {"ratio": own[1]["value"] / own[0]["value"]}]
    return rows


def main(
    model: Annotated[Path, typer.Argument(help="a dense Hugging Face folder in bf16")],
    rank: Annotated[int, typer.Option(min=1)] = 32,
    requests: Annotated[int, typer.Option(min=1, help="at one time")] = 8,
    tokens: Annotated[int, typer.Option(min=1, help="decoded for each request")] = 16,
    repetitions: Annotated[int, typer.Option(min=1)] = 3,
    output: Annotated[Path, typer.Option(help="all figures as JSON")] = Path("bench.json"),
    as_it_is: Annotated[bool, typer.Option("--as-it-is", help="SGLang without the plugin")] = False,
) -> None:
    """Measure, print a Markdown table, write JSON."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        memory = contextlib.nullcontext() if as_it_is else ordinary_memory(Path(name) / "plugin")
        with memory:
            rows = bench(model, rank, requests, tokens, repetitions, Path(name))
    print(markdown("adapters", rows), flush=True)
    output.write_text(json.dumps({"machine": machine(), "rank": rank, "adapters": rows}, indent=2) + "\n")


if __name__ == "__main__":
    try:
        typer.run(main)
    except PmdError as error:
        sys.exit(f"{type(error).__name__}: {error}")
