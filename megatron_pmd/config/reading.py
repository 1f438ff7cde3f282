"""From plain values and the command line's assignments to the tree; errors name the setting."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from megatron_pmd.config.run import RunConfig
from megatron_pmd.errors import ConfigError


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
        raise ConfigError("\n".join(_explain(e) for e in error.errors())) from None


def _explain(error: Any) -> str:
    # a discriminated union puts its tag (`file`, `reasoning_gym`) in the location: not part of the user's key
    key = ".".join(str(p) for p in error["loc"] if p not in ("file", "reasoning_gym"))
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, known_keys(RunConfig), n=1, cutoff=0.5)
        return f"{key} is not a setting" + (f" (did you mean {near[0]}?)" if near else "")
    return f"{key}: {error['msg']} (got {error['input']!r})"


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
