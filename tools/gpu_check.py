"""First contact with a GPU: what of the CUDA half works here, one table, one JSON file.

    python -m tools.gpu_check [--output gpu_check.json]

Each check is a process of its own, so that one that crashes ends alone. A check that this machine cannot do
is listed as skipped, with the reason. Without CUDA the checks that need none run on small shapes, which shows
that the tool works, nothing about a GPU.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from tools.gpu_iteration import whole_iterations
from tools.gpu_trial import COMPARED, Trial, make_model, shape_of

LIMIT_SECONDS = 1000
RECIPES = ("tensorwise", "delayed", "blockwise", "mxfp8")
FP8_VARIANTS = {
    "blockwise parameters gathered": ["actor.fp8.recipe=blockwise", "actor.fp8.parameter_gather=true"],
    "tensorwise but for the first and last layer": [
        "actor.fp8.recipe=tensorwise", "actor.fp8.first_layers_bf16=1", "actor.fp8.last_layers_bf16=1",
    ],
}  # fmt: skip
STEP, ADAPTERS = "step in bf16", "step of adapters alone"
LORA = ["actor.lora.rank=16", "actor.lora.alpha=32"]
STEPS = {
    STEP: [],
    **{f"step in fp8, {recipe}": [f"actor.fp8.recipe={recipe}"] for recipe in RECIPES},
    **{f"step in fp8, {name}": settings for name, settings in FP8_VARIANTS.items()},
    "step with bf16 moments": ["optimizer.moments=bf16"],
    "step with the optimizer on the host": ["optimizer.offload=1"],
    "step with Muon": ["optimizer.name=muon"],
    ADAPTERS: LORA,
    f"{ADAPTERS}, over fp8 tensorwise": [*LORA, "actor.fp8.recipe=tensorwise"],
}
"""Settings of each step. Those of adapters are compared with the step of adapters in bf16."""
CHECKS = ["log-probs against transformers", "gradient against transformers", "packed against alone", *STEPS]
CHECKS += ["offload and return", "offload and return in fp8, tensorwise"]
RESUMES = {
    "bf16": [],
    "bf16 moments": ["optimizer.moments=bf16"],
    "the optimizer on the host": ["optimizer.offload=1"],
    "half of the optimizer on the host": ["optimizer.offload=0.5"],
    "fp8, blockwise parameters gathered": FP8_VARIANTS["blockwise parameters gathered"],
    "Muon": ["optimizer.name=muon"],
    "adapters alone": LORA,
}
CHECKS += [f"checkpoint and resume with {what}" for what in RESUMES]
CHECKS += ["weights through a CUDA IPC handle"]
ITERATIONS = {
    "two whole iterations with an engine": [],
    "two whole iterations of adapters alone": LORA,
}
CHECKS += list(ITERATIONS)
SKIPPED = "skipped"
READER = """
import json, sys, time
import torch
from megatron_pmd.weight_sync import loader
class Model(torch.nn.Module):
    def load_weights(self, weights):
        self.loaded = [tensor.clone() for _, tensor in weights]
if torch.cuda.is_available():
    torch.zeros(1, device="cuda").sum().item()  # the start of CUDA is not the handle's time
description = json.load(sys.stdin)
for last in (False, True):  # the first time loads modules and kernels; a handle is opened and closed once
    begin = time.monotonic()
    loader.load_description(Model(), description | {"ends": last and description.get("ends", False)})
    seconds = time.monotonic() - begin
print(seconds)
"""
"""An engine as far as weights go: opens the handle, checks every sum, copies every tensor; twice."""


def against_transformers(folder: Path) -> dict[str, float]:
    report = Trial(folder).log_probs([list(range(16))])
    return {"mean difference": report.sum_absolute / report.tokens, "largest": report.max_absolute}


def gradient_against_transformers(folder: Path) -> dict[str, float]:
    """Relative errors; both sides compute in bf16."""
    import torch

    trial = Trial(folder, "optimizer.gradient_clip=1e9")
    trial.steps(1)
    for parameter in trial.actor.chunks[0].parameters():
        parameter.data.copy_(parameter.main_grad)  # so that the export gives it its name
    expected = torch.load(folder / "gradients.pt")
    errors = {
        name: float((tensor.cpu().float() - expected[name].float()).norm() / expected[name].float().norm())
        for name, tensor in trial.actor.export()
        if name in expected
    }
    return {what: errors[name] for what, name in COMPARED.items()}


def packed_against_alone(folder: Path) -> dict[str, float]:
    trial = Trial(folder)
    packed = trial.log_probs([list(range(16))]).log_probs
    alone = trial.log_probs([[i] for i in range(16)]).log_probs
    difference = (packed - alone).abs()
    return {"mean difference": float(difference.nanmean()), "largest": float(difference.nan_to_num().max())}


def checkpoint_and_resume(folder: Path, *settings: str) -> dict[str, float]:
    """The step after a checkpoint, once without and once with loading it: the differences have to be 0."""
    trial = Trial(folder, *settings)
    trial.step(1e-5)
    begin = time.monotonic()
    saved = trial.actor.save(folder / "checkpoints", 1, {})
    stalled, written = time.monotonic() - begin, time.monotonic()
    trial.actor.publish_checkpoint(wait=True)
    written = time.monotonic() - written
    expected = trial.step(1e-5)
    begin = time.monotonic()
    trial.actor.load(saved)
    loaded, found = time.monotonic() - begin, trial.step(1e-5)
    size = sum(file.stat().st_size for file in saved.iterdir())
    shutil.rmtree(saved)
    return {
        "loss difference": abs(found.loss_sum - expected.loss_sum),
        "gradient norm difference": abs(found.gradient_norm - expected.gradient_norm),
        "GB": size / 1e9,
        "GB/s while training stands still": size / 1e9 / stalled,
        "seconds to write": written,
        "seconds to load": loaded,
    }


def offload_and_return(folder: Path, *settings: str) -> dict[str, float]:
    """Everything off the device and back, twice; what stays behind is the allocator's own account.

    The first time away makes the pinned memory on the host.
    """
    import torch

    trial = Trial(folder, *settings)
    trial.steps(1)
    seconds_away, seconds_back = [], []
    torch.cuda.synchronize()
    resident = torch.cuda.memory_allocated()
    for _ in range(2):
        begin = time.monotonic()
        trial.actor.release_optimizer()
        trial.actor.release_parameters()
        torch.cuda.synchronize()
        left, away = torch.cuda.memory_allocated(), time.monotonic()
        trial.actor.wake()
        torch.cuda.synchronize()
        seconds_away.append(away - begin)
        seconds_back.append(time.monotonic() - away)
    moved = (resident - left) / 1e9
    return {
        "GB moved": moved,
        "GB left": left / 1e9,
        "GB/s away, the first time": moved / seconds_away[0],
        "GB/s away": moved / seconds_away[-1],
        "GB/s back": moved / seconds_back[-1],
        "loss after": trial.steps(1)["loss"],
    }


def read_elsewhere(description: dict[str, Any]) -> float:
    """Seconds that another process takes to load the described bucket. Raises ModelError if it does not."""
    from megatron_pmd.errors import ModelError

    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", READER],
        input=json.dumps(description), capture_output=True, text=True, timeout=LIMIT_SECONDS,
    )  # fmt: skip
    if done.returncode:
        raise ModelError(f"the other process did not load the bucket: {done.stderr[-500:]}")
    return float(done.stdout)


def through_a_handle(folder: Path) -> dict[str, float]:
    """A bucket on this device, read by a process that stands for an engine; what is left of it afterwards."""
    import torch

    from megatron_pmd.weight_sync.device_bucket import DeviceBucket

    size = shape_of(folder).bucket_bytes
    bucket = DeviceBucket("gpu-check", size)
    for i in range(8):
        entry = bucket.layout.add(f"tensor {i}", "bfloat16", (size // 4096 // 8, 2048))
        bucket.tensor(entry).normal_()
    torch.cuda.synchronize()
    description = bucket.description(handle=bucket.handle()) | {"ends": True}
    seconds = read_elsewhere(description)
    bucket.close()
    return {
        "GB": size / 1e9,
        "GB/s": size / 1e9 / seconds,
        "GB left": torch.cuda.memory_reserved() / 1e9,
    }


def check(name: str, folder: Path) -> dict[str, float]:
    """Run one of CHECKS in this process. Raises ConfigError where this machine cannot."""
    from megatron_pmd.errors import ConfigError

    if name in STEPS:
        return Trial(folder, *STEPS[name]).steps(5)
    if name in ITERATIONS:
        return whole_iterations(folder, *ITERATIONS[name])
    if (what := name.removeprefix("checkpoint and resume with ")) != name:
        return checkpoint_and_resume(folder, *RESUMES[what])
    of_cuda: dict[str, Callable[[Path], dict[str, float]]] = {
        "offload and return": offload_and_return,
        "offload and return in fp8, tensorwise": lambda folder: offload_and_return(
            folder, "actor.fp8.recipe=tensorwise"
        ),
        "weights through a CUDA IPC handle": through_a_handle,
    }
    if name in of_cuda:
        import torch

        if not torch.cuda.is_available():
            raise ConfigError("there is one memory on a CPU: nothing to leave it, or to be opened on it")
        return of_cuda[name](folder)
    actions: dict[str, Callable[[Path], dict[str, float]]] = {
        "log-probs against transformers": against_transformers,
        "gradient against transformers": gradient_against_transformers,
        "packed against alone": packed_against_alone,
    }
    return actions[name](folder)


def run_here(name: str, folder: Path) -> dict[str, Any]:
    """Status and figures of one check, in this process; what it raises when it fails is raised."""
    from megatron_pmd.errors import ConfigError

    try:
        return {"status": "ran", "figures": check(name, folder)}
    except ConfigError as error:
        return {"status": SKIPPED, "why": str(error)}


def run_check(name: str, folder: Path) -> dict[str, Any]:
    """Status and figures of one check, from a process of its own."""
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "tools.gpu_check",
        "--check",
        name,
        "--folder",
        str(folder),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        return {"status": "failed", "why": f"not done after {LIMIT_SECONDS} s"}
    result = folder / "result.json"
    if result.exists():
        outcome = json.loads(result.read_text())
        result.unlink()
        return outcome
    lines = (done.stderr or done.stdout).strip().splitlines() or [""]
    return {"status": "failed", "why": lines[-1][:500]}


def relative_to_bf16(results: dict[str, dict[str, Any]]) -> None:
    """Add, to each step, its loss, gradient norm and speed relative to the bf16 step's.

    Adapters have a norm of their own, which is compared with that over weights in bf16.
    """
    for name, result in results.items():
        of_adapters = name.startswith(f"{ADAPTERS},")
        base = results[ADAPTERS if of_adapters else STEP].get("figures") if name in STEPS else None
        if not base or "figures" not in result or name == STEP:
            continue
        own = result["figures"]
        own["loss error"] = abs(own["loss"] / base["loss"] - 1)
        if name != ADAPTERS:
            own["gradient norm error"] = abs(own["gradient norm"] / base["gradient norm"] - 1)
        own["speed-up"] = base["seconds"] / own["seconds"]


def main(
    output: Path = Path("gpu_check.json"),
    check_name: str = typer.Option("", "--check"),
    folder: Path = Path(),
) -> None:
    """Run all checks; --check and --folder are for the processes that this starts."""
    from megatron_pmd.observe.versions import versions as environment_versions

    if check_name:
        (folder / "result.json").write_text(json.dumps(run_here(check_name, folder)))
        return
    import torch

    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else "no CUDA device: small shapes on the CPU"
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        make_model(Path(temporary), "large" if cuda else "small", "cuda" if cuda else "cpu")
        if cuda:
            torch.cuda.empty_cache()  # the checks have processes of their own, and need the device
        for name in CHECKS:
            results[name] = run_check(name, Path(temporary))
    relative_to_bf16(results)
    versions = {"date": f"{datetime.now():%Y-%m-%d}", "device": device, "cuda": torch.version.cuda}
    versions |= environment_versions()["packages"]
    output.write_text(json.dumps({"versions": versions, "checks": results}, indent=1))
    table = Table("check", "status", "figures, or why not", title=f"{device}, torch {torch.__version__}")
    for name, result in results.items():
        figures = ", ".join(f"{key} {value:.3g}" for key, value in result.get("figures", {}).items())
        table.add_row(name, result["status"], figures or result["why"])
    Console().print(table)
    if any(result["status"] == "failed" for result in results.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
