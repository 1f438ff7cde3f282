"""`megatron-pmd convert`: hf-to-megatron, megatron-to-hf, diff."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Optional

import typer

from megatron_pmd.cli.extras import needs
from megatron_pmd.cli.numbers import finite
from megatron_pmd.errors import CheckpointError, ConfigError
from megatron_pmd.files import iterations_in

app = typer.Typer(help="Convert checkpoints, with proof; under torchrun, each rank converts its part.")

Precision = Literal["bf16", "fp32", "fp8"]
Verify = Annotated[bool, typer.Option(help="read back: every tensor's bytes, and the logits of both models")]
ShardGigabytes = Annotated[float, typer.Option(min=0.001, callback=finite, help="largest size of one file")]
OutOption = Annotated[Path, typer.Option(help="folder to make; must not exist")]
ModelOption = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(help="Hugging Face folder of the model: config.json, tokenizer; needed where none is known"),
]


@app.command("hf-to-megatron")
def hf_to_megatron(
    model: Annotated[Path, typer.Argument(help="a Hugging Face model folder")],
    out: OutOption,
    dtype: Annotated[Precision | None, typer.Option(help="default: as in the folder")] = None,
    shard_gigabytes: ShardGigabytes = 5.0,
    verify: Verify = False,
) -> None:
    """Convert a model folder into a checkpoint that any parallel layout can load."""
    with needs("cpu"):
        from megatron_pmd.convert.session import ranks

    with ranks() as control:
        from megatron_pmd.convert.to_megatron import hf_to_megatron

        manifest = hf_to_megatron(
            model, out, control, dtype=dtype, part_bytes=int(shard_gigabytes * 1e9), verified=verify
        )
        _report(control, out, manifest)


@app.command("megatron-to-hf")
def megatron_to_hf(
    checkpoint: Annotated[Path, typer.Argument(help="a checkpoint's folder, or a run's")],
    out: OutOption,
    iteration: Annotated[Optional[int], typer.Option(help="of a run; default: its newest")] = None,  # noqa: UP045
    model: ModelOption = None,
    dtype: Annotated[Precision | None, typer.Option(help="default: as in the checkpoint")] = None,
    shard_gigabytes: ShardGigabytes = 5.0,
    verify: Verify = False,
) -> None:
    """Convert a checkpoint, saved under any parallel layout, into a model folder."""
    with needs("cpu"):
        from megatron_pmd.convert.session import ranks

    path, config_folder = locate(checkpoint, iteration, model)
    with ranks() as control:
        from megatron_pmd.convert.to_hugging_face import megatron_to_hf

        manifest = megatron_to_hf(
            path, config_folder, out, control,
            dtype=dtype, shard_bytes=int(shard_gigabytes * 1e9), verified=verify,
        )  # fmt: skip
        _report(control, out, manifest)


@app.command("diff")
def diff(
    first: Annotated[Path, typer.Argument(help="a model folder, a checkpoint's folder, or a run's (newest)")],
    second: Annotated[Path, typer.Argument(help="the same")],
    model: ModelOption = None,
) -> None:
    """Compare two checkpoints tensor by tensor; exit code 1 if they differ."""
    with needs("cpu"):
        from megatron_pmd.convert.session import ranks

    sides = [locate(path, None, model, needed=False) for path in (first, second)]
    config_folder = next((folder for _, folder in sides if folder), None)
    with ranks():
        from megatron_pmd.convert.diff import compare, open_side

        if config_folder is None:
            raise ConfigError(f"{first}, {second}: --model must name the Hugging Face folder of the model")
        same, differences = compare(*(open_side(path, config_folder) for path, _ in sides))
    for difference in differences:
        typer.echo(f"{difference.name}: {difference.what}")
    typer.echo(f"{same} tensors are the same bit for bit, {len(differences)} are not")
    if differences:
        raise typer.Exit(1)


def locate(path: Path, iteration: int | None, model: Path | None, *, needed: bool = True) -> tuple[Path, Any]:
    """A checkpoint's folder and its model's, from either a checkpoint's own folder or a run's.

    Raises CheckpointError for a run without that checkpoint, naming those it has; ConfigError when no model
    folder is known and one is needed.
    """
    from megatron_pmd.config import load
    from megatron_pmd.convert import SIDE_FILES

    if (path / "checkpoints").is_dir():
        if model is None:
            model = Path(load(path / "config.json").model.path)
        path = _of_run(path, iteration)
    elif iteration is not None:
        raise ConfigError(f"{path} is not a run's folder: --iteration has no meaning for it")
    elif not path.is_dir():
        raise CheckpointError(f"{path}: no such folder")
    if model is None:
        known = [folder for folder in (path, path / SIDE_FILES) if (folder / "config.json").is_file()]
        model = known[0] if known else None
    if model is None and needed:
        raise ConfigError(
            f"{path}: --model must name the model's Hugging Face folder (config.json, tokenizer)"
        )
    return path, model


def _of_run(run: Path, iteration: int | None) -> Path:
    """A run's checkpoint of this iteration, or its newest."""
    found = iterations_in(run / "checkpoints").items()
    complete = {number: folder for number, folder in found if (folder / ".metadata").is_file()}
    if not complete:
        raise CheckpointError(f"{run / 'checkpoints'}: no complete checkpoint")
    if iteration is not None and iteration not in complete:
        kept = ", ".join(map(str, sorted(complete)))
        raise CheckpointError(f"{run}: no checkpoint of iteration {iteration}; there are {kept}")
    return complete[max(complete) if iteration is None else iteration]


def _report(control: Any, out: Path, manifest: dict[str, Any]) -> None:
    if not control.is_driver:
        return
    from megatron_pmd.convert.parts import MANIFEST

    typer.echo(f"{out}: {len(manifest['tensors'])} tensors, each once; {out / MANIFEST} lists them")
    for name, reason in manifest.get("left_out", {}).items():
        typer.echo(f"left out: {name}: {reason}")
    for name, folder in manifest.get("untrained", {}).items():
        typer.echo(f"not trained: {name}: as {folder} has it")
    for name, rows in manifest.get("padding_rows_removed", {}).items():
        typer.echo(f"{name}: {rows} rows of padding removed")
    if "verified" in manifest:
        logits = manifest["verified"]["logits"]
        says = f"differ by at most {logits:.2g} in fp32" if isinstance(logits, float) else str(logits)
        typer.echo(f"verified: {manifest['verified']['tensors']} tensors bit for bit; logits {says}")
