"""`megatron-pmd data`: what a run would read of a problem file."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Optional

import typer

from megatron_pmd.cli.extras import needs
from megatron_pmd.config import FileSource, Model, ProblemSource, Reward, data_of_file
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
        from megatron_pmd.data.preview import describe, headline
        from megatron_pmd.data.rows import is_problem_file
        from megatron_pmd.data.tokenizer import load_tokenizer

    reading = Model(path=str(model)) if model else None
    sources: tuple[ProblemSource, ...]
    # any other file that is there is no recipe either: the reader says which kinds there are
    other = Path(file_or_recipe).suffix not in (".py", ".json") and Path(file_or_recipe).is_file()
    is_file = is_problem_file(file_or_recipe) or other
    if is_file:
        data = data_of_file(FileSource(path=file_or_recipe), settings or [])
        ungraded, unlimited = Reward(name="exact"), sys.maxsize
        sources = tuple(
            ProblemSource.of(key, source, data, ungraded, unlimited)
            for key, source in data.sources_of("train").items()
        )
    else:
        config = configuration(file_or_recipe, settings or [])
        reading = reading or (config.model if Path(config.model.path).exists() else None)
        sources = config.all_sources
    tokenizer = load_tokenizer(reading) if reading else None
    for source in sources:
        if not is_file:
            typer.echo(f"=== {headline(source, sources)}")
        shown = replace(source, max_prompt_tokens=max_prompt_tokens) if max_prompt_tokens else source
        for line in describe(shown, tokenizer, first):
            typer.echo(line)
