"""From plain values and the command line's assignments to the tree; errors name the setting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from megatron_pmd.config.algorithm import OBJECTIVES, Objective, objective_class
from megatron_pmd.config.data import MIXTURE, SINGLE, Data, FileSource
from megatron_pmd.config.frozen import Frozen, WrongValue
from megatron_pmd.config.run import RunConfig
from megatron_pmd.errors import ConfigError
from megatron_pmd.plugins import did_you_mean


def known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key of the tree, inner models before their fields' own keys are listed under them."""
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        for inner in models_in(field.annotation):
            keys += known_keys(inner, f"{prefix}{name}.")
        for inner in listed_in(field.annotation):
            keys += known_keys(inner, f"{prefix}{name}.0.")
    return list(dict.fromkeys(keys))


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The groups of settings that a field of this type can hold: several for a union."""
    if annotation is Objective:
        return [objective_class(name) for name in OBJECTIVES]
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, BaseModel) else []
    if get_origin(annotation) is tuple:
        return []
    return [m for argument in get_args(annotation) for m in models_in(argument)]


def listed_in(annotation: Any) -> list[type[BaseModel]]:
    """The groups of settings that a field of this type can hold a list of."""
    inner = listed_in if get_origin(annotation) is not tuple else models_in
    return [m for argument in get_args(annotation) for m in inner(argument)]


def build(values: dict[str, Any]) -> RunConfig:
    """Validate a tree of plain values; raises ConfigError with one line a problem."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(explain(error, RunConfig))) from None


def explain(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """What was wrong with the model's values, one line a problem; an unknown key with the nearest."""
    return [_explained(problem, model) for problem in error.errors()]


def _explained(problem: Any, model: type[BaseModel]) -> str:
    """One of pydantic's problems in this program's words."""
    kind, context = problem["type"], problem.get("ctx", {})
    key = ".".join(str(part) for part in problem["loc"] if part not in OF_PYDANTIC)
    if isinstance(wrong := context.get("error"), WrongValue):
        return f"{key}{'.' * bool(key)}{wrong.field}: {wrong} (got {wrong.value!r})"
    if kind == "extra_forbidden":
        return _unknown(key, str(problem["loc"][-2]) if len(problem["loc"]) > 1 else "", model)
    if kind == "missing":
        return f"{key} is not set and has no default: give it"
    if kind in ("model_type", "model_attributes_type"):
        inner = next(name for group in _models_at(model, key.split(".")) for name in group.model_fields)
        return f"{key} is a group of settings, not a value (got {problem['input']!r}): set {key}.{inner}, …"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        kinds = " or ".join(group.model_fields["kind"].default for group in _models_at(model, key.split(".")))
        given = f" (got {context['tag']!r})" if "tag" in context else ""
        return f"{key}.kind must be {kinds}{given}"
    says = "Input should be a JSON list" if kind in ("tuple_type", "list_type") else problem["msg"]
    return f"{key}: {says} (got {problem['input']!r})"


OF_PYDANTIC = (
    "file", "reasoning_gym", "verifiers", "[key]", "str", "tuple[str, ...]", "tuple[str,...]", SINGLE, MIXTURE
)  # fmt: skip
"""pydantic's own words in the place of a problem: a union's tag or member, a mapping's key."""


def _unknown(key: str, tag: str, model: type[BaseModel]) -> str:
    """Why a key is not a setting here. tag: which of several kinds of group it was found in."""
    *parents, leaf = key.split(".")
    owners = [
        group.model_fields["kind"].default
        for group in _models_at(model, parents)
        if leaf in group.model_fields and "kind" in group.model_fields
    ]
    if owners:
        kind = ".".join([*parents, "kind"])
        return f"{key} is a setting of {kind}={owners[0]}, not of {tag}: remove it, or set {kind}={owners[0]}"
    known = known_keys(model)
    if place := next((part for part in parents if part.isdigit()), None):
        known = [other.replace(".0.", f".{place}.") for other in known]
    # what stands elsewhere in its group is nearer than what is spelt like it
    moved = [other for other in known if other.startswith(key.split(".")[0]) and other.endswith(f".{leaf}")]
    return f"{key} is not a setting{did_you_mean(key, moved or known, cutoff=0.5)}"


def _models_at(model: type[BaseModel], path: list[str]) -> list[type[BaseModel]]:
    """The groups of settings that can stand at a dotted key."""
    found, listed = [model], list[type[BaseModel]]()
    for name in path:
        if name.isdigit():
            found, listed = listed, []
            continue
        types = [group.model_fields[name].annotation for group in found if name in group.model_fields]
        found = [inner for annotation in types for inner in models_in(annotation)]
        listed = [inner for annotation in types for inner in listed_in(annotation)]
    return found


def override(config: RunConfig, assignments: list[str]) -> RunConfig:
    """Apply `dotted.key=value` settings; a value is read as JSON where it is JSON, else as a string.

    A whole group comes before single settings of it, and a choice, as of the objective, before the settings
    of what is chosen, in whatever order they stand.
    """
    values = _as_set(config)
    _assign(values, assignments)
    return build(values)


def _as_set(config: RunConfig) -> dict[str, Any]:
    """Its plain values without what RunConfig.resolved wrote: what is assigned may change what follows."""
    values = config.model_dump(mode="json")
    unset = config.sync.model_copy(update=dict.fromkeys(DERIVED))
    follows = config.model_copy(update={"sync": unset}).resolved().sync
    for bound in DERIVED:
        if values["sync"][bound] == getattr(follows, bound):
            values["sync"][bound] = None
    return values


DERIVED = ("mean_log_prob_difference", "p99_log_prob_difference")
"""Settings of sync that follow from others where they are null."""


def _assign(values: dict[str, Any], assignments: list[str]) -> None:
    """Write `dotted.key=value` settings into a tree of plain values; see override."""
    settings = [_setting(assignment) for assignment in assignments]
    for key, value in sorted(
        settings, key=lambda setting: (setting[0].count("."), not _is_choice(setting[0]))
    ):
        *parents, leaf = key.split(".")
        node = _group(values, key, parents)
        if node.get(leaf) != value and _is_choice(key):
            node.clear()  # the settings of what was chosen before mean nothing to another
        node[leaf] = value


class _DataAlone(Frozen):
    """The part of a run's configuration that reads problems."""

    data: Data


def data_of_file(file: FileSource, settings: list[str]) -> Data:
    """How a problem file is read, by `data.key=value` settings as a run has them; the file is data.train."""
    values: dict[str, Any] = {"data": {"train": file.model_dump(mode="json")}}
    _assign(values, settings)
    try:
        data = _DataAlone.model_validate(values).data
    except ValidationError as error:
        lines = "\n".join(explain(error, _DataAlone))
        raise ConfigError(f"{lines}\nA problem file has the settings data.* alone") from None
    if getattr(data.train, "path", None) != file.path:
        raise ConfigError(
            f"data.train is {file.path}, the file that was named: leave its kind and path unset"
        )
    return data


def _is_choice(key: str) -> bool:
    """Whether the setting says which settings there are beside it."""
    return key == "algorithm.objective.name" or key.endswith(
        (".source.kind", "train.kind", "evaluation.kind")
    )


def _setting(assignment: str) -> tuple[str, Any]:
    key, separator, text = assignment.partition("=")
    if not separator or not all(key.split(".")):
        raise ConfigError(f"{assignment!r} is not of the form dotted.key=value")
    if text == "None":  # as Python and docs/configuration.md call it; it would be a text
        raise ConfigError(f"{key}=None: write null for none; the text is '\"None\"'")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    if key == "algorithm.objective" and isinstance(value, str):
        key = "algorithm.objective.name"
    return key, value


def _group(values: dict[str, Any], key: str, parents: list[str]) -> dict[str, Any]:
    """The group of settings that the key is in, made where there is none; `0` is the first of a list."""
    node: Any = values
    for parent in parents:
        if isinstance(node, list):
            node = _of_list(node, parent, key)
            continue
        child = node.get(parent)
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict | list):
            raise ConfigError(f"{key} is not a setting: {parent} is a value, not a group of settings")
        node = child
    if isinstance(node, list):
        raise _not_in_list(node, key, key.rpartition(".")[2])
    return node


def _of_list(entries: list[Any], place: str, key: str) -> Any:
    """The group of settings at a place of a list."""
    if place.isdigit() and int(place) < len(entries) and isinstance(entries[int(place)], dict):
        return entries[int(place)]
    raise _not_in_list(entries, key, place)


def _not_in_list(entries: list[Any], key: str, place: str) -> ConfigError:
    before = key.partition(f".{place}")[0]
    return ConfigError(
        f"{key} is not a setting: {before} is a list of {len(entries)}; name one of them by its place, from "
        f"{before}.0, or give the whole list"
    )


def load(path: Path) -> RunConfig:
    """Read a resolved config.json as written beside a run."""
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON: {error}; is the file whole, and in UTF-8?") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: not a JSON object; give the config.json of a run")
    try:
        return build(values)
    except ConfigError as error:
        raise type(error)(f"{path}: {error}") from None
