"""`megatron-pmd data`: what a run would read of a problem file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from megatron_pmd.cli.extras import needs
from megatron_pmd.config import Model, Source, data_of_file
from recipes import configuration

Settings = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Argument(help="dotted.key=value as for train, e.g. data.train.answer_key=label"),
]


def data(
    file_or_recipe: Annotated[str, typer.Argument(help="a problem file, a recipe, or a run's config.json")],
    settings: Settings = None,
    model: Annotated[Optional[Path], typer.Option(help="model folder whose tokenizer reads it")] = None,  # noqa: UP045
    max_prompt_tokens: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="longer prompts are dropped; default: the recipe's limit"),
    ] = None,
    first: Annotated[int, typer.Option(min=0, help="problems shown in full")] = 2,
) -> None:
    """Show what would be read: counts, drops with reasons, token lengths, the first prompts in full."""
    with needs("cpu"):
        from megatron_pmd.data.preview import Reader, describe
        from megatron_pmd.data.rows import is_problem_file
        from megatron_pmd.data.tokenizer import load_tokenizer

    reading = Model(path=str(model)) if model else None
    sources: dict[str, Source]
    # any other file that is there is no recipe either: the reader says which kinds there are
    other = Path(file_or_recipe).suffix not in (".py", ".json") and Path(file_or_recipe).is_file()
    if is_problem_file(file_or_recipe) or other:
        described = data_of_file(file_or_recipe, settings or [])
        sources = {"": described.train}
    else:
        config = configuration(file_or_recipe, settings or [])
        described, ptx = config.data, config.algorithm.ptx
        reading = reading or (config.model if Path(config.model.path).exists() else None)
        max_prompt_tokens = max_prompt_tokens or config.batch.max_prompt_tokens
        named = {"data.train": described.train, "data.evaluation": described.evaluation}
        sources = {key: source for key, source in named.items() if source}
        sources |= {"algorithm.ptx.source": ptx.source} if ptx else {}
    reader = Reader(load_tokenizer(reading), max_prompt_tokens) if reading else None
    for key, source in sources.items():
        if key:
            typer.echo(f"=== {key}")
        for line in describe(source, described, reader, first):
            typer.echo(line)
