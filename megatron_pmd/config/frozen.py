"""What every group of settings is made of."""

from __future__ import annotations

import math
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, model_validator

Seed = Annotated[int, Field(ge=0, lt=2**31)]
"""numpy, torch, megatron-core (which adds to it) and SGLang each take a seed of this range."""


class WrongValue(ValueError):
    """A value that pydantic lets pass; says which field of the group has it."""

    def __init__(self, field: str, value: Any, reason: str) -> None:
        super().__init__(reason)
        self.field, self.value = field, value


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, values: Any) -> Any:
        """Refuse what Python and its JSON let pass as a number: true, 20 digits, Infinity in an object."""
        for name, field in cls.model_fields.items():
            if not isinstance(values, dict) or name not in values:
                continue
            value, annotation = values[name], field.annotation
            if isinstance(value, bool) and not _may_be_bool(annotation):
                raise WrongValue(name, value, "true and false are no numbers and no text")
            if isinstance(value, int) and abs(value) >= 2**63:
                raise WrongValue(name, value, "the number has too many digits")
            if get_origin(annotation) is dict and not _is_finite(value):
                raise WrongValue(name, value, "every number in it must be finite")
        return values


def _may_be_bool(annotation: Any) -> bool:
    """Of a field; of a group of settings pydantic says what it is."""
    kinds = {annotation, *get_args(annotation)}
    return bool({bool, Any} & kinds) or any(
        isinstance(kind, type) and issubclass(kind, BaseModel) for kind in kinds
    )


def _is_finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)
