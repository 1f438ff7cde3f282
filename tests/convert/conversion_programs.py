"""What the tests run on a conversion's ranks, see tests/actor/launch.py."""

from __future__ import annotations

import functools
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_pmd.convert.live import write_policy
from megatron_pmd.convert.session import ranks
from megatron_pmd.errors import PmdError

PART_BYTES = 150_000
"""Several parts even of the tiny models."""


def run(program: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    with ranks() as control:
        return program(control, **arguments)


def _message(action: Any) -> tuple[str, str]:
    """Type and text of what the action raises; ("", "") if nothing."""
    try:
        action()
    except PmdError as error:
        return type(error).__name__, str(error)
    except Exception as error:
        return f"not a PmdError: {type(error).__name__}", str(error)
    return "", ""


def round_trips(
    control: Any, cases: list[tuple[Path, Path, Any]], verified: tuple[list[str], list[str]]
) -> dict[str, tuple[dict, dict]]:
    """(model, folder, dtype) → folder/megatron, folder/hf; both manifests, by the folder's name.

    verified: those whose logits are compared on the way there, and on the way back.
    """
    from megatron_pmd.convert import reference
    from megatron_pmd.convert.to_hugging_face import megatron_to_hf
    from megatron_pmd.convert.to_megatron import hf_to_megatron
    from tests.convert import forked_reference

    reference.logits = forked_reference.logits
    manifests = {}
    for model, folder, dtype in cases:
        folder.mkdir(parents=True)
        check_there, check_back = (folder.name in names for names in verified)
        there = hf_to_megatron(
            model, folder / "megatron", control, dtype=dtype, part_bytes=PART_BYTES, verified=check_there
        )
        back = megatron_to_hf(
            folder / "megatron", folder / "megatron/hf", folder / "hf", control,
            shard_bytes=PART_BYTES, verified=check_back,
        )  # fmt: skip
        manifests[folder.name] = there, back
    return manifests


def to_hf(control: Any, cases: dict[str, tuple[Path, Path, Path]], **options: Any) -> dict[str, dict]:
    """name: (checkpoint, model, out) → the manifest of each."""
    from megatron_pmd.convert.to_hugging_face import megatron_to_hf

    return {
        name: megatron_to_hf(*paths, control, shard_bytes=PART_BYTES, **options)
        for name, paths in cases.items()
    }


def proofs(
    control: Any,
    checkpoint: Path,
    same: Path,
    damaged: Path,
    doubled: Path,
    latent: tuple[Path, Path],
    out: Path,
) -> dict[str, Any]:
    """What verifying a damaged folder, and one whose model computes otherwise, raises; what is left out.

    same, damaged: Hugging Face folders of the checkpoint's model. doubled: a tied model that has its output
    layer all the same. latent: a checkpoint and its model, written to out/bf16 and verified.
    """
    from megatron_pmd.convert import reference
    from megatron_pmd.convert.to_hugging_face import megatron_to_hf
    from megatron_pmd.convert.to_megatron import hf_to_megatron
    from megatron_pmd.convert.verify import verify

    def shifted(*arguments: Any, **options: Any) -> torch.Tensor:
        return logits(*arguments, **options) + 2e-4

    logits = reference.logits
    results: dict[str, Any] = {
        "unchanged": _message(lambda: verify(same, checkpoint, control)),
        "damaged": _message(lambda: verify(damaged, checkpoint, control)),
    }
    reference.logits = shifted
    results["other logits"] = _message(lambda: verify(same, checkpoint, control))
    reference.logits = logits
    results["left out"] = hf_to_megatron(doubled, out / "doubled", control, part_bytes=PART_BYTES)["left_out"]
    megatron_to_hf(*latent, out / "bf16", control, shard_bytes=PART_BYTES, dtype="bf16", verified=True)
    return results


def to_megatron(control: Any, model: Path, out: Path, kill_at: int | None = None) -> dict:
    """Convert; kill_at: this process kills itself when it is to write this part."""
    from megatron_pmd.convert import sharded
    from megatron_pmd.convert.to_megatron import hf_to_megatron

    write = sharded.write_part

    def killing(folder: Path, number: int, *arguments: Any) -> Any:
        if number == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return write(folder, number, *arguments)

    sharded.write_part = killing  # type: ignore[assignment]
    return hf_to_megatron(model, out, control, part_bytes=PART_BYTES)


def refusals(
    control: Any,
    folders: dict[str, Path],
    checkpoints: dict[str, tuple[Path, Path]],
    out: Path,
) -> dict[str, tuple[str, str]]:
    """What converting each folder, and each checkpoint (with its model), raises."""
    from megatron_pmd.convert.to_hugging_face import megatron_to_hf
    from megatron_pmd.convert.to_megatron import hf_to_megatron

    results = {}
    for name, folder in folders.items():
        convert = functools.partial(hf_to_megatron, folder, out / name, control, part_bytes=PART_BYTES)
        results[name] = _message(convert)
    for name, (checkpoint, model) in checkpoints.items():
        convert = functools.partial(
            megatron_to_hf, checkpoint, model, out / name, control, shard_bytes=PART_BYTES
        )
        results[name] = _message(convert)
    return results


def disk_full(control: Any, model: Path, checkpoint: Path, out: Path) -> dict[str, tuple[str, str]]:
    """Both directions with a limit on a file's size, which stands for a full disk, then again without."""
    from megatron_pmd.convert.to_hugging_face import megatron_to_hf
    from megatron_pmd.convert.to_megatron import hf_to_megatron

    there = functools.partial(hf_to_megatron, model, out / "megatron", control, part_bytes=PART_BYTES)
    back = functools.partial(megatron_to_hf, checkpoint, model, out / "hf", control, shard_bytes=PART_BYTES)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    results = {"to megatron": _message(there), "to hf": _message(back)}
    results["published"] = ("", " ".join(path.name for path in out.iterdir() if not path.suffix))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return {**results, "to megatron, again": _message(there), "to hf, again": _message(back)}


def load_as_megatron_does(
    control: Any, model: Path, checkpoint: Path, layout: dict[str, int], out: Path
) -> dict[str, torch.Tensor]:
    """The tensors after megatron-core loaded the checkpoint over zeros; and `out`, as training writes it."""
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from megatron.core.utils import unwrap_model

    from megatron_pmd.actor import parallel
    from megatron_pmd.actor.actor import Actor
    from megatron_pmd.config import Layout
    from megatron_pmd.distributed import Control
    from tests.actor.tiny_models import config_for

    # the ranks of a conversion share nothing: these are to hold one model together
    parallel_state.destroy_model_parallel()
    parallel.form_groups(Layout(**layout), seed=0, timeout_seconds=60)
    control = Control(60)
    actor = Actor(config_for(model, layout), control)
    (module,) = unwrap_model(actor.chunks)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    state = module.sharded_state_dict(metadata={"dp_cp_group": group})
    # a conversion writes no Transformer Engine state: for bf16 and fp32 weights it is empty
    state = {key: entry for key, entry in state.items() if not isinstance(entry, ShardedObject)}
    module.load_state_dict(dist_checkpointing.load(state, str(checkpoint)), strict=False)
    write_policy(actor.export(), actor.shapes.keys(), model, out, control)
    return {name: tensor.detach().clone() for name, tensor in actor.export()}
