"""The tokenizer of a model folder, which is looked at before transformers is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_pmd.config import Model
from megatron_pmd.errors import DataError, ModelError
from megatron_pmd.files import read_object

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "tiktoken.model",
    "tokenizer_config.json",
)


def check_model_folder(folder: Path) -> dict[str, Any]:
    """The config.json of a Hugging Face folder. Raises ModelError for a folder that is none."""
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such model folder (relative paths start at {Path.cwd()})")
    try:
        found = read_object(folder / "config.json")
    except DataError as error:
        raise ModelError(str(error)) from None
    if found is None:
        raise ModelError(
            f"{folder}: no config.json there; give the folder of a Hugging Face model (config.json, "
            "tokenizer, safetensors)"
        )
    return found


def load_tokenizer(model: Model) -> Any:
    """The Hugging Face tokenizer of the model's folder. ModelError if the folder has none, or a bad one."""
    folder = Path(model.path)
    check_model_folder(folder)
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        raise ModelError(
            f"{folder}: no tokenizer there; copy tokenizer.json and tokenizer_config.json of the model that "
            "it was made from into it"
        )
    _check_own_code(folder, trusted=model.trust_remote_code)
    from transformers import AutoTokenizer  # it takes seconds

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    except Exception as error:  # whatever a tokenizer's class or its files' contents lead to
        raise ModelError(
            f"{folder}: the tokenizer cannot be loaded: {type(error).__name__}: {error}; copy its files from "
            "the model that it was made from again"
        ) from error


def _check_own_code(folder: Path, *, trusted: bool) -> None:
    """ModelError for a tokenizer that is code of the folder, which is not trusted.

    transformers 5 would make one of the vocabulary instead, which can cut text otherwise
    (models/auto/tokenization_auto.py).
    """
    code = (read_object(folder / "tokenizer_config.json") or {}).get("auto_map", {})
    if "AutoTokenizer" in code and not trusted and not (folder / "tokenizer.json").is_file():
        raise ModelError(
            f"{folder}: its tokenizer is Python code of this folder (auto_map in tokenizer_config.json): "
            "read that, then set model.trust_remote_code=true"
        )
