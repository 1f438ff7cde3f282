"""One run of adapters with a real engine: its syncs, its checkpoints, and the folders that it leaves."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import AutoModelForCausalLM

from megatron_pmd.rollout_file import read_rollout
from tests.convert.command_line import tensors
from tests.end_to_end.command_line import CommandLine, wait_until

pytestmark = pytest.mark.slow

RANK, ALPHA = 4, 6
WORDS = (
    f"actor.lora.rank={RANK}", f"actor.lora.alpha={ALPHA}", "optimizer.learning_rate=2e-3", "iterations=2",
    "checkpoint.hf_export_every=1", "data.evaluation=null",
)  # fmt: skip
TARGETS = tuple(f"{name}_proj.weight" for name in ("q", "k", "v", "o", "gate", "up", "down"))


@pytest.fixture(scope="module")
def adapted(command_line: CommandLine) -> Path:
    """The folder of a complete run of two iterations with a live engine."""
    command_line.run("lora", *WORDS)
    return command_line.path("lora")


@pytest.fixture(scope="module")
def base(adapted: Path, command_line: CommandLine) -> Path:
    return command_line.folder / "models" / "tiny-moe"


def test_engine_and_actor_agree_on_every_sampled_token_after_every_sync(
    adapted: Path, command_line: CommandLine
) -> None:
    lines = [line for line in command_line.lines("lora", "metrics.jsonl") if line["kind"] == "iteration"]
    assert [line["iteration"] for line in lines] == [0, 1]
    for line in lines:
        assert line["sync/mean_abs_difference"] <= 1e-5
        assert line["sync/max_abs_difference"] <= 1e-3
    assert (2, "check") in command_line.phases("lora"), "the last sync is compared too, or the run fails"


def test_killed_and_resumed_it_takes_the_same_steps_to_the_same_adapters(
    adapted: Path, command_line: CommandLine
) -> None:
    """On the same rollouts: the second iteration needs the adapters and the moments of the first."""
    words, folder = (*WORDS, "--replay", str(adapted / "rollouts")), command_line.path("lora_killed")
    process = command_line.start("lora_killed", *words)
    wait_until((folder / "checkpoints" / "iteration-1").exists, "a checkpoint", process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert "resuming after 1 iterations" in command_line.run("lora_killed", *words)
    steps = command_line.steps("lora")
    assert len(steps) == 4 and all(step["gradient_norm"] > 0 for step in steps)
    assert command_line.steps("lora_killed") == steps
    found, expected = (tensors(run / "adapters" / "iteration-2") for run in (folder, adapted))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_a_checkpoint_holds_adapters_alone(adapted: Path) -> None:
    for folder in (adapted / "checkpoints").iterdir():
        held = FileSystemReader(folder).read_metadata().state_dict_metadata
        names = [name for name, entry in held.items() if isinstance(entry, TensorStorageMetadata)]
        assert names and all(".adapter." in name for name in names)


def test_the_merged_folder_is_the_base_and_the_adapters_product_and_nothing_else_moved(
    adapted: Path, base: Path
) -> None:
    """W + alpha / rank · B A of each target, and the base's own bits elsewhere; B started as zero."""
    before = tensors(base)
    for iteration in ("iteration-1", "iteration-2"):
        merged, adapters = tensors(adapted / "hf" / iteration), tensors(adapted / "adapters" / iteration)
        assert merged.keys() == before.keys()
        targets, untouched = {name for name in before if name.endswith(TARGETS)}, []
        assert {f"{name.split('.lora_')[0]}.weight" for name in adapters} == {
            f"base_model.model.{name}" for name in targets
        }
        for name, weight in before.items():
            if name not in targets:
                assert torch.equal(merged[name], weight), name
                continue
            layer = f"base_model.model.{name.removesuffix('.weight')}"
            a, b = (adapters[f"{layer}.{matrix}.weight"].double() for matrix in ("lora_A", "lora_B"))
            change = ALPHA / RANK * b @ a
            if not change.any():
                untouched.append(name)
            torch.testing.assert_close(merged[name].double(), weight + change, rtol=0, atol=1e-6)
        # a router may send no token to an expert
        assert all(".experts." in name for name in untouched) and len(untouched) < len(targets) / 4


def test_the_second_iteration_moves_the_adapters_of_every_target_further(adapted: Path) -> None:
    first, second = (tensors(adapted / "adapters" / f"iteration-{n}") for n in (1, 2))
    moved = {
        name.split(".experts.")[0].partition(".lora_")[0]
        for name in first
        if not torch.equal(first[name], second[name])
    }
    assert moved == {name.split(".experts.")[0].partition(".lora_")[0] for name in first}


def test_peft_over_the_base_gives_the_merged_folders_logits(adapted: Path, base: Path) -> None:
    from peft import PeftModel

    def read(folder: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float64, experts_implementation="eager"
        )

    loaded = PeftModel.from_pretrained(read(base), adapted / "adapters" / "iteration-2")
    merged, bare = read(adapted / "hf" / "iteration-2"), read(base)
    for sample in read_rollout(adapted / "rollouts" / "1.parquet")[0]:
        tokens = torch.from_numpy(sample.tokens)[None].long()
        with torch.no_grad():
            found, expected, untrained = (model(tokens).logits for model in (loaded, merged, bare))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        assert (expected - untrained).abs().max() > 1e-2
