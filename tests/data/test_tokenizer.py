"""Which tokenizers are refused before transformers makes something else of their files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_pmd.config import Model
from megatron_pmd.data.tokenizer import load_tokenizer
from megatron_pmd.errors import ModelError


def test_a_tokenizer_that_is_code_of_its_folder_is_refused_until_that_is_trusted(tmp_path: Path) -> None:
    """As Moonlight and Kimi-K2 are published: transformers 5 would cut text by a pattern of its own."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deepseek_v3"}))
    (tmp_path / "tiktoken.model").write_text("YQ== 0\nYg== 1\n")
    own = {"auto_map": {"AutoTokenizer": ["code_of_folder.Letters", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(own))
    (tmp_path / "code_of_folder.py").write_text(
        "from transformers import PreTrainedTokenizer\n\n\n"
        "class Letters(PreTrainedTokenizer):\n"
        "    vocab_size = 2\n\n"
        "    def get_vocab(self):\n        return {'a': 0, 'b': 1}\n\n"
        "    def _tokenize(self, text):\n        return list(text)\n\n"
        "    def _convert_token_to_id(self, token):\n        return 'ab'.index(token)\n"
    )
    with pytest.raises(ModelError, match=r"Python code of this folder .* model\.trust_remote_code=true"):
        load_tokenizer(Model(path=str(tmp_path)))
    trusted = load_tokenizer(Model(path=str(tmp_path), trust_remote_code=True))
    assert trusted.encode("abba", add_special_tokens=False) == [0, 1, 1, 0]
