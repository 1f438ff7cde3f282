"""From plain values and the command line's assignments to the tree; errors name the setting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from megatron_pmd.config.run import RunConfig
from megatron_pmd.errors import ConfigError
from megatron_pmd.plugins import did_you_mean


def known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key of the tree, inner models before their fields' own keys are listed under them."""
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        for inner in _models_in(field.annotation):
            keys += known_keys(inner, f"{prefix}{name}.")
    return list(dict.fromkeys(keys))


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [m for argument in getattr(annotation, "__args__", ()) for m in _models_in(argument)]


def build(values: dict[str, Any]) -> RunConfig:
    """Validate a tree of plain values; raises ConfigError with one line a problem."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(explain(error, RunConfig))) from None


def explain(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """What was wrong with the model's values, one line a problem; an unknown key with the nearest."""
    lines = []
    for problem in error.errors():
        # pydantic's own words for a place: a union's tag, a mapping's key
        key = ".".join(str(p) for p in problem["loc"] if p not in ("file", "reasoning_gym", "[key]"))
        if problem["type"] == "extra_forbidden":
            lines.append(f"{key} is not a setting{did_you_mean(key, known_keys(model), cutoff=0.5)}")
        else:
            lines.append(f"{key}: {problem['msg']} (got {problem['input']!r})")
    return lines


def override(config: RunConfig, assignments: list[str]) -> RunConfig:
    """Apply `dotted.key=value` settings; a value is read as JSON where it is JSON, else as a string."""
    values = config.model_dump(mode="json")
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        if not separator:
            raise ConfigError(f"{assignment!r} is not of the form dotted.key=value")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        node = values
        *parents, leaf = key.split(".")
        for parent in parents:
            child = node.get(parent)
            if child is None:
                child = node[parent] = {}
            if not isinstance(child, dict):
                raise ConfigError(f"{key} is not a setting: {parent} is a value, not a group of settings")
            node = child
        node[leaf] = value
    return build(values)


def load(path: Path) -> RunConfig:
    """Read a resolved config.json as written beside a run."""
    try:
        return build(json.loads(path.read_text()))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not JSON: {error}") from None
