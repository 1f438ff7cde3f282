"""What a run loads, and what it leaves out because it could not train on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_pmd.config import RunConfig, override
from megatron_pmd.data.demonstrations import demonstrations
from megatron_pmd.data.problem_sets import ProblemSets
from megatron_pmd.errors import DataError
from recipes import recipe


class Letters:
    """A tokenizer of one letter a token, whose template adds nothing."""

    chat_template, eos_token_id = "{{ messages }}", 0

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> list[int]:
        return self.encode(messages[-1]["content"])

    def encode(self, text: str, **_: Any) -> list[int]:
        return [1 + ord(letter) % 100 for letter in text]

    def decode(self, tokens: list[int], **_: Any) -> str:
        return "".join(chr(97 + token % 26) for token in tokens)


def config_of(path: Path, lengths: list[int], *settings: str) -> RunConfig:
    """Prompts of 10 tokens with answers of these lengths, and a pass that holds 64 tokens."""
    path.write_text("".join(json.dumps({"prompt": "x" * 10, "answer": "y" * n}) + "\n" for n in lengths))
    config = override(
        recipe("tiny_moe_cpu"),
        [
            "batch.max_prompt_tokens=16",
            "batch.max_response_tokens=16",
            "batch.max_tokens_per_microbatch=64",
            "actor.experts.replay_routing=false",
            "data.evaluation=null",
            "data.prompt_suffix=",
            "data.system_prompt=null",
        ],
    )
    file = json.dumps({"kind": "file", "path": str(path)})
    return override(config, [f"data.train={file}", *(setting.replace("FILE", file) for setting in settings)])


SFT = ("algorithm.objective=sft", "batch.samples_per_prompt=1")
PTX = ("warm_start=null", 'algorithm.ptx={"weight": 1, "examples_per_step": 2, "source": FILE}')


@pytest.mark.parametrize(
    ("settings", "what"), [((), "training"), ((*SFT, "warm_start=null"), "training"), (PTX, "supervised")]
)
def test_an_answer_that_no_pass_holds_is_dropped_with_a_count_at_loading(tmp_path, settings, what):
    """10 prompt tokens, 53 of the answer and its end are the 64 of a pass; one more is too many."""
    said: list[str] = []
    config = config_of(tmp_path / "problems.jsonl", [5, 54, 53, 5000], *settings)
    problems = ProblemSets.load(config, Letters(), said.append)
    [line] = said
    assert line.startswith(f"2 of 4 {what} prompts have with their answers over 64 tokens")
    source = problems.supervised or problems.train
    samples = demonstrations(source.take(len(source)), Letters())
    assert sorted(len(sample.tokens) for sample in samples) == [16, 64]


def test_a_long_answer_that_is_only_compared_is_kept(tmp_path):
    said: list[str] = []
    config = config_of(tmp_path / "problems.jsonl", [5, 5000], "warm_start=null")
    assert len(ProblemSets.load(config, Letters(), said.append).train) == 2 and said == []


def test_a_file_of_nothing_but_answers_that_no_pass_holds_is_refused_at_loading(tmp_path):
    config = config_of(tmp_path / "problems.jsonl", [70, 80])
    with pytest.raises(
        DataError, match=r"all 2 .* 64 tokens .* shortest has 81: raise batch\.max_tokens_per"
    ):
        ProblemSets.load(config, Letters(), print)
