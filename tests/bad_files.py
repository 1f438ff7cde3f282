"""The files of docs/bad_input.md: each is wrong in the way that its name says."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

GOOD = {"prompt": "1 + 1?", "answer": "2"}
USER = {"role": "user", "content": "1 + 1?"}

ROWS: dict[str, Any] = {
    "no_prompt": {"question": "1 + 1?", "answer": "2"},
    "verl": {"prompt": [USER], "reward_model": {"style": "rule", "ground_truth": "2"}},
    "null_answer": GOOD | {"answer": None},
    "nan_answer": GOOD | {"answer": float("nan")},
    "true_answer": GOOD | {"answer": True},
    "list_answer": GOOD | {"answer": ["2"]},
    "number_prompt": GOOD | {"prompt": 7},
    "blank_prompt": GOOD | {"prompt": " "},
    "no_messages": GOOD | {"prompt": []},
    "no_role": GOOD | {"prompt": [{"content": "1 + 1?"}]},
    "human": GOOD | {"prompt": [USER | {"role": "human"}]},
    "null_content": GOOD | {"prompt": [USER | {"content": None}]},
    "picture": GOOD | {"prompt": [USER | {"content": [{"type": "image_url", "image_url": "a.png"}]}]},
    "answered": GOOD | {"prompt": [USER, {"role": "assistant", "content": "2"}]},
    "own_system": GOOD | {"prompt": [{"role": "system", "content": "Be brief."}, USER]},
    "half_token": GOOD | {"limit": 0.5},
    "hard": GOOD | {"level": "hard"},
}
"""JSON-lines files of this line."""


def write(folder: Path) -> None:
    """All of them."""
    good = json.dumps(GOOD) + "\n"
    for name, row in ROWS.items():
        (folder / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "good.jsonl").write_text(good)
    (folder / "empty.jsonl").write_text("\n")
    (folder / "table.csv").write_text("prompt,answer\n")
    (folder / "cut.jsonl").write_text(good + good[:20])
    (folder / "latin1.jsonl").write_bytes(good.encode() + '{"prompt": "é", "answer": "2"}'.encode("latin-1"))
    (folder / "utf16.jsonl").write_text(good, encoding="utf-16")
    (folder / "array.json").write_text(json.dumps([GOOD]))
    (folder / "number.jsonl").write_text("7\n")
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(good.encode() * 99)[:40])
    (folder / "plain.jsonl.gz").write_text(good)
    (folder / "fake.parquet").write_text("prompt")
    pq.write_table(pa.Table.from_pylist([{"prompt": "x", "solution": "2"}]), folder / "solution.parquet")
    (folder / "folder.jsonl").mkdir()
    _models(folder)
    _configurations(folder)


def _models(folder: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.WordLevel({"a": 0, "<end>": 1}, unk_token="a"))
    templates = {
        "base_model": None,
        "stern_model": "{{ raise_exception('no questions, please') }}",
        "thinking_model": "{{ messages[0].content }}{% if enable_thinking %}<think>{% endif %}",
    }
    for name, template in templates.items():
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>")
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder / name)
        (folder / name / "config.json").write_text('{"model_type": "qwen3"}')
    for name in ("no_config_model", "latin1_model", "no_tokenizer_model", "broken_tokenizer_model"):
        (folder / name).mkdir()
        if name != "no_config_model":
            (folder / name / "config.json").write_text('{"model_type": "qwen3"}')
    (folder / "latin1_model" / "config.json").write_bytes(b'{"model_type": "\xe9"}')
    (folder / "broken_tokenizer_model" / "tokenizer.json").write_text("{}")


def _configurations(folder: Path) -> None:
    for name, content in (
        ("cut", b'{"name": "a"'), ("latin1", b'{"name": "\xe9"}'), ("list", b"[1]"), ("empty", b"{}")
    ):  # fmt: skip
        (folder / name).mkdir()
        (folder / name / "config.json").write_bytes(content)
    (folder / "syntax.py").write_text("def syntax(:\n")
    (folder / "nothing.py").write_text("def nothing():\n    return None\n")
    (folder / "two.py").write_text("def one() -> 'RunConfig': ...\ndef another() -> 'RunConfig': ...\n")
    (folder / "not_toml.toml").write_text("gpu = \n")
    (folder / "misspelt.toml").write_text('gpu = "h100"\nprtition = "batch"\n')
