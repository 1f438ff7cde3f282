"""Write docs/configuration.md from the configuration's docstrings: keys, types, defaults, meanings."""

from __future__ import annotations

import json
import re
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megatron_pmd.config import OBJECTIVES, Objective, RunConfig
from megatron_pmd.config.reading import listed_in, models_in

TARGET = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"
HEAD = """\
# Configuration

Written by `make docs` from the docstrings in `megatron_pmd/config/`; edit those.

A recipe returns this tree; `megatron-pmd train RECIPE key=value …` changes it, with the dotted keys below.
A value is read as JSON where it is JSON, else as a string; for the None of a meaning write `null`. `0` in
a key is the first of a list, `1` the second. An unknown key is an error. The resolved tree is written to
the run's `config.json`, which can be given in place of a recipe. In a group that is off unless one of its
keys is set, as `actor.lora` or `reward.remote`, `required` means: needed as soon as another key of the group
is set.
"""
NUMBERS = {"Gt": ">", "Ge": "≥", "Lt": "<", "Le": "≤"}


def reference() -> str:
    """The page."""
    groups = {name: models_in(field.annotation) for name, field in RunConfig.model_fields.items()}
    single = [row(name, field) for name, field in RunConfig.model_fields.items() if not groups[name]]
    parts = [HEAD, "## The run\n", table(single)]
    for name, models in groups.items():
        if models:
            parts += [f"## {name}\n", *(section(name, model) for model in models)]
    return "\n".join(parts)


def section(name: str, model: type[BaseModel]) -> str:
    # pydantic gives a model without a docstring its parent's
    text = f"{model.__doc__}\n\n" if model.__doc__ and model.__doc__ != BaseModel.__doc__ else ""
    optional = RunConfig.model_fields[name].default is None
    return (
        text + ("Not there unless one of its keys is set.\n\n" if optional else "") + table(rows(name, model))
    )


def rows(
    prefix: str, model: type[BaseModel], note: str = "", given: BaseModel | None = None
) -> list[tuple[str, ...]]:
    """One line a key; the alternatives of a union follow one another, each marked with its tag.

    given: the group as it is where nobody sets it.
    """
    found = []
    for name, field in model.model_fields.items():
        key, inner = f"{prefix}.{name}", models_in(field.annotation)
        if field.annotation is Objective:
            found += rows_of_objectives(key, field)
            continue
        if not inner:
            found.append(row(key, field, note, given))
        for alternative in inner:
            kind = alternative.model_fields.get("kind")
            mark = f" (kind `{kind.default}`)" if kind and len(inner) > 1 else note
            found += rows(
                key, alternative, mark, field.default if isinstance(field.default, alternative) else None
            )
        for entry in listed_in(field.annotation):
            found += rows_of_list(key, entry)
    return found


def rows_of_list(key: str, model: type[BaseModel]) -> list[tuple[str, ...]]:
    """Settings of a list's first entry; a group in it says where its own settings are."""
    found = []
    for name, field in model.model_fields.items():
        there = row(f"{key}.0.{name}", field, " (of a list)")
        found.append((there[0], "group of settings", *there[2:]) if models_in(field.annotation) else there)
    return found


def rows_of_objectives(key: str, field: FieldInfo) -> list[tuple[str, ...]]:
    """The choice, then each objective's settings, marked with its name."""
    names = ", ".join(f"`{name}`" for name in OBJECTIVES)
    choice = f"{names}, `module:Class` or `path/to/file.py:Class`"
    found: list[tuple[str, ...]] = [
        (f"`{key}.name`", choice, f"`{json.dumps(field.default)}`", meaning(field))
    ]
    for name, objective in zip(OBJECTIVES, models_in(Objective), strict=True):
        settings = {k: setting for k, setting in objective.model_fields.items() if k != "name"}
        found += [row(f"{key}.{k}", setting, f" ({name})") for k, setting in settings.items()]
    return found


def row(key: str, field: FieldInfo, note: str = "", given: BaseModel | None = None) -> tuple[str, ...]:
    if given is None and field.is_required():
        return f"`{key}`{note}", kind(field), "required", meaning(field)
    value = field.default if given is None else given.model_dump(mode="json")[key.rpartition(".")[2]]
    # written as the command line takes it
    default = f"`{json.dumps(value, ensure_ascii=False)}`"
    return f"`{key}`{note}", kind(field), default, meaning(field)


def meaning(field: FieldInfo) -> str:
    return " ".join((field.description or "").split())


def kind(field: FieldInfo) -> str:
    bounds = [
        f"{sign} {getattr(limit, name.lower())}"
        for limit in field.metadata
        if (sign := NUMBERS.get(name := type(limit).__name__))
    ]
    pattern = next((p for limit in field.metadata if (p := getattr(limit, "pattern", None))), None)
    return ", ".join([spelled(field.annotation), *bounds, *([f"matches `{pattern}`"] if pattern else [])])


def spelled(annotation: Any) -> str:
    """A type in words; the bounds of PositiveInt and its like are in its metadata."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join("null" if a is type(None) else spelled(a) for a in arguments)
    if hasattr(annotation, "__metadata__"):  # Annotated, inside a union
        return kind(FieldInfo.from_annotation(annotation))
    words = {
        int: "integer",
        float: "number",
        bool: "true or false",
        str: "text",
        dict: "JSON object",
        list: "JSON list",
        tuple: "JSON list",
    }
    return words.get(origin or annotation) or str(annotation)


def table(lines: list[tuple[str, ...]]) -> str:
    cells = [[re.sub(r"\|", r"\\|", cell) for cell in line] for line in lines]
    body = [
        f"| {' | '.join(line)} |" for line in [["key", "type", "default", "meaning"], ["---"] * 4, *cells]
    ]
    return "\n".join(body) + "\n"


if __name__ == "__main__":
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(reference())
    print(TARGET)
