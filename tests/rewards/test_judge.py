"""A chat model as a judge: what it is asked, which of its words count, and what its failures cost."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from openai.types.chat import ChatCompletion
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming
from pydantic import TypeAdapter

from megatron_pmd.config import Judge, Reward
from megatron_pmd.data.problems import Problem
from megatron_pmd.errors import ConfigError, PmdError
from megatron_pmd.rewards import service as service_module
from megatron_pmd.rewards.grading import grading
from megatron_pmd.rewards.judge import JudgeReward
from megatron_pmd.rewards.pool import Verdict
from tests.rewards.test_remote import Reply, service
from tests.test_tutorials import blocks, follow

PROBLEM = Problem(
    3, ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "6 * 7?"}), "42"
)
ASKED: TypeAdapter[Any] = TypeAdapter(CompletionCreateParamsNonStreaming)


def says(text: str | None, finish_reason: Any = "stop") -> Reply:
    """A chat completion, as OpenAI's own types have it."""
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "finish_reason": finish_reason, "message": message, "logprobs": None}
    made = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
    return 200, ChatCompletion.model_validate(made).model_dump()


def reward(url: str, **changes: Any) -> Reward:
    judge = Judge(url=url.removesuffix("/grade") + "/v1/", model="m", retries=2, **changes)
    return Reward(name="judge", judge=judge, timeout_seconds=5)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(service_module, "RETRY_PAUSE_SECONDS", 0.01)


def judged(reply: Reply, response: str = "It is 42.", **changes: Any) -> tuple[Verdict, list[dict[str, Any]]]:
    with service(lambda _: reply) as (url, sent), grading(reward(url, **changes)) as rewards:
        return rewards.submit(response, PROBLEM).result(), sent


def test_the_judge_is_asked_in_the_words_of_the_template_and_its_score_is_the_reward():
    template = "Q: {question} A: {response} R: {answer}"
    thinking = "<think>Hm, 6 * 7?</think>\nIt is {answer}: 42."
    verdict, (sent,) = judged(says("Good.\n\n**Score: 7**"), thinking, template=template, max_tokens=50)
    assert verdict == Verdict(0.7)
    assert sent == {
        "model": "m",
        "messages": [{"role": "user", "content": "Q: 6 * 7? A: It is {answer}: 42. R: 42"}],
        "temperature": 0,
        "max_tokens": 50,
    }
    assert ASKED.validate_python(sent, extra="forbid")


@pytest.mark.parametrize(
    ("said", "score"),
    [
        ("Score: 3 at first. No: Score: 8", 0.8),
        ("<think>Score: 1</think>Score: 10", 1.0),
        ("**Score**: 2.5/10", 0.25),
        ("score 0", 0.0),
    ],
)
def test_the_last_score_that_the_judge_writes_counts(said, score):
    assert judged(says(said))[0] == Verdict(score)


def test_a_pattern_and_a_highest_score_of_ones_own():
    verdict, _ = judged(says("[[4]]"), score_pattern=r"\[\[(\d)\]\]", highest_score=5)
    assert verdict == Verdict(0.8)


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (says("It is right."), "the judge gave no score: 'It is right.'"),
        (says("Let me", "length"), "no score, cut at reward.judge.max_tokens=1024: 'Let me'"),
        (says(None), "the judge gave no score"),
        (says("Score: 11"), "the judge gave 11, which is not from 0 to 10"),
        (says("Score: -1"), "the judge gave -1"),
        ((200, {"choices": []}), "the judge gave no reward"),
        ((200, {"choices": [{"message": {"content": [1]}}]}), "the judge gave no reward"),
        ((200, b"<html>"), "the judge gave no reward: <html>"),
        ((400, b"too long"), "the judge answered HTTP 400: too long"),
    ],
)
def test_what_is_wrong_with_one_answer_costs_that_sample(reply, reason):
    verdict, sent = judged(reply)
    assert verdict.reward == 0.0 and reason in str(verdict.error)
    assert len(sent) == 1


@pytest.mark.parametrize(("status", "requests"), [(401, 1), (404, 1), (503, 3)])
def test_a_judge_that_refuses_or_stays_away_ends_the_run(status, requests):
    message = "correct the settings" if requests == 1 else "judge http.*/v1/chat/completions failed 3 times"
    with service(lambda _: (status, b"no")) as (url, sent), grading(reward(url)) as rewards:
        with pytest.raises(PmdError, match=f"the {message}|HTTP {status}: no; .*{message}"):
            rewards.submit("42", PROBLEM).result()
        assert len(sent) == requests


def test_equal_responses_are_judged_once_also_while_the_first_is_on_its_way():
    waiting = threading.Event()

    def answer(_: dict[str, Any]) -> Reply:
        waiting.wait(10)
        return says("Score: 5")

    with service(answer) as (url, sent), grading(reward(url)) as rewards:
        futures = [rewards.submit("42", PROBLEM) for _ in range(8)] + [rewards.submit("41", PROBLEM)]
        waiting.set()
        assert [future.result() for future in futures] == [Verdict(0.5)] * 9
        assert rewards.grade([("42", PROBLEM)]) == [Verdict(0.5)]
    assert len(sent) == 2


def test_the_key_comes_from_a_file_and_is_sent_as_a_bearers_token(tmp_path: Path):
    (tmp_path / "key").write_text("sk-1\n")
    rewards = JudgeReward(reward("http://127.0.0.1:9/grade", key_file=str(tmp_path / "key")))
    assert rewards.client.headers["Authorization"] == "Bearer sk-1"
    assert rewards.url == "http://127.0.0.1:9/v1/chat/completions"
    for content in (b"", b"\xff\xfe", "ключ".encode(), b"two\nlines"):
        (tmp_path / "key").write_bytes(content)
        with pytest.raises(ConfigError, match=r"key_file: .*key (does not hold a key|cannot be read)"):
            JudgeReward(reward("http://127.0.0.1:9/grade", key_file=str(tmp_path / "key")))
    with pytest.raises(ConfigError, match=r"key_file: absent cannot be read: .*No such file"):
        JudgeReward(reward("http://127.0.0.1:9/grade", key_file="absent"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"template": "{respons}"}, r"has \{respons\} \(did you mean response\?\)"),
        ({"template": "{answer}"}, r"has no \{response\}"),
        ({"score_pattern": "("}, "is no regular expression"),
        ({"score_pattern": "a"}, "has 0 groups; one"),
    ],
)
def test_a_judge_that_could_not_grade_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Judge(url="http://here/v1", model="m", **settings)


def test_the_page_on_judges_prints_what_it_says(tmp_path: Path):
    expected = next(block.text for block in blocks("docs/judges.md") if block.language == "text")
    assert follow("docs/judges.md", tmp_path).splitlines()[-2:] == expected.splitlines()
