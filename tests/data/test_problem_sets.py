"""What a run loads, and what it leaves out because it could not train on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_pmd.config import RunConfig, override
from megatron_pmd.data.demonstrations import demonstrations
from megatron_pmd.data.problem_sets import ProblemSets
from megatron_pmd.data.sources import problems_of
from megatron_pmd.errors import DataError
from recipes import recipe


class Letters:
    """A tokenizer of one letter a token, whose template adds nothing."""

    chat_template, eos_token_id = "{{ messages }}", 0

    def get_chat_template(self) -> str:
        return self.chat_template

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


def mixed(tmp_path: Path, *settings: str, **own: Any) -> RunConfig:
    """Two files of three problems with prompts of 10 tokens; own: settings of the second source."""
    config = config_of(tmp_path / "a.jsonl", [1, 2, 3], "warm_start=null")
    (tmp_path / "b.jsonl").write_text((tmp_path / "a.jsonl").read_text())
    entries = [
        {"name": name, "source": {"kind": "file", "path": str(tmp_path / f"{name}.jsonl")}}
        for name in ("a", "b")
    ]
    entries[1] |= own
    train = f"data.train={json.dumps(entries)}"
    entries[1].pop("weight", None)
    evaluation = f"data.evaluation={json.dumps(entries)}"
    return override(config, [train, evaluation, "evaluation.prompts=2", *settings])


def test_a_sources_own_settings_hold_for_its_problems_and_for_no_others(tmp_path):
    own = {
        "system_prompt": "Be brief.", "prompt_suffix": "?", "template_arguments": {"messages_of": "b"},
        "max_response_tokens": 7, "weight": 2, "reward": {"name": "exact", "answer": "last_line"},
    }  # fmt: skip
    tokenizer = Letters()
    tokenizer.chat_template = "{{ messages }} {{ messages_of }}"
    problems = ProblemSets.load(mixed(tmp_path, **own), tokenizer, print)
    drawn = problems.train.take(9)
    assert sum(problem.source == "b" for problem in drawn) == 6
    for problem in (*drawn, *problems.held_out):
        mine = problem.source == "b"
        assert problem.messages[-1]["content"] == "x" * 10 + "?" * mine
        assert (problem.messages[0]["role"] == "system") == mine
        assert problem.template_arguments == ({"messages_of": "b"} if mine else {})
        assert problem.token_budget == (7 if mine else None)
        assert problem.reward is not None and problem.reward.answer == ("last_line" if mine else "whole")
    assert [p.key for p in problems.held_out] == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]


def test_a_problems_own_budget_and_its_sources_limit_hold_both(tmp_path):
    config = mixed(tmp_path, "data.train.1.source.token_budget_key=budget", max_response_tokens=7)
    rows = [{"prompt": "x" * 10, "answer": "y", "budget": budget} for budget in (3, 9, None)]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (_, source) = config.problem_sources("train")
    assert [problem.token_budget for problem in problems_of(source)] == [3, 7, 7]


def test_a_prompt_over_its_sources_limit_is_dropped_with_the_sources_name(tmp_path):
    said: list[str] = []
    config = mixed(tmp_path, max_prompt_tokens=12, prompt_suffix="!!")
    ProblemSets.load(config, Letters(), said.append)
    assert said == []
    with pytest.raises(
        DataError, match=r"data\.train\.1 \(b\): all 3 prompts are longer than data\.train\.1\."
    ):
        ProblemSets.load(mixed(tmp_path, max_prompt_tokens=12, prompt_suffix="!!!"), Letters(), said.append)


def test_a_mixtures_saved_order_goes_on_in_a_new_start(tmp_path):
    first, second = (ProblemSets.load(mixed(tmp_path), Letters(), print) for _ in range(2))
    first.train.take(5)
    second.load_state(json.loads(json.dumps(first.state())))
    assert [p.key for p in second.train.take(6)] == [p.key for p in first.train.take(6)]


def test_held_out_problems_that_nothing_would_sample_are_told_and_not_read(tmp_path):
    said: list[str] = []
    held_out = json.dumps({"kind": "file", "path": str(tmp_path / "absent.jsonl")})
    config = config_of(
        tmp_path / "problems.jsonl", [3, 3], f"data.evaluation={held_out}", "algorithm.objective=sft",
        "batch.samples_per_prompt=1", "warm_start=null",
    )  # fmt: skip
    assert ProblemSets.load(config, Letters(), said.append).held_out == []
    assert said == [
        "data.evaluation: this run has no engines, and samples no held-out problems; "
        "`megatron-pmd evaluate` does, of its model"
    ]


def test_a_tokenizer_that_ends_no_text_is_refused_where_answers_are_learned(tmp_path):
    endless = Letters()
    endless.eos_token_id = None  # type: ignore[assignment]
    config = config_of(tmp_path / "p.jsonl", [4] * 8, *SFT, "warm_start=null")
    with pytest.raises(DataError, match="has no end-of-sequence token, which ends an answer that is learned"):
        ProblemSets.load(config, endless, lambda _: None)
