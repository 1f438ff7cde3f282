"""A teacher behind SGLang's /generate: what it is asked, what comes of its answers, and who cannot be one."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_pmd.config import Teacher
from megatron_pmd.errors import ConfigError, EngineError, PmdError
from megatron_pmd.rollout import generate_client, teacher
from megatron_pmd.rollout.teacher import check_teacher, endpoint_of
from tests.rewards.test_remote import Reply, service
from tests.rollout.test_sampler import Numbers, rollout_for, sampler_for
from tests.test_tutorials import blocks, follow
from tools.bench.stub_engine import StubEngine, serving

INFO = {"is_generation": True}
"""Of what SGLang 0.5.23 answers to /model_info for a model that generates text."""


def answered(log_probs: list[float | None], tokens: list[int]) -> Reply:
    """As SGLang 0.5.23 answers to /generate with no token to be sampled, recorded on a CPU."""
    entries = [[value, token, None] for value, token in zip(log_probs, tokens, strict=True)]
    information = {
        "id": "0f", "finish_reason": {"type": "length", "length": 0}, "prompt_tokens": len(tokens),
        "weight_version": "default", "input_token_logprobs": entries, "output_token_logprobs": [],
    }  # fmt: skip
    return 200, {"text": "", "output_ids": [], "meta_info": information}


def scored(body: dict[str, Any]) -> Reply:
    """Each token's log-probability is its number / −100; of the first that is asked for there is none."""
    assert body["sampling_params"] == {"max_new_tokens": 0} and body["return_logprob"]
    tokens = body["input_ids"][body["logprob_start_len"] :]
    return answered([None, *(-token / 100 for token in tokens[1:])], tokens)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate_client, "RETRY_PAUSE_SECONDS", 0.01)


@pytest.fixture(scope="module")
def engine() -> Iterator[str]:
    with serving(StubEngine()) as url:
        yield url


def settings(url: str, **changes: Any) -> Teacher:
    return Teacher(url=url.removesuffix("/grade") + "/", **{"retries": 1, "timeout_seconds": 5} | changes)


def test_every_sampled_token_of_a_trained_response_is_scored_and_nothing_else(engine: str) -> None:
    with service(scored) as (url, sent):
        sampler = sampler_for(engine, teacher=endpoint_of(settings(url, max_in_flight=2)))
        rollout, evaluation = rollout_for(3, scored=True), rollout_for(3)
        sampler.run(rollout)
        sampler.run(evaluation)
    samples = rollout.samples(Numbers())
    assert len(sent) == len(samples) == 12
    for sample in samples:
        given = sample.teacher_log_probs
        assert given is not None and given.dtype == np.float32
        np.testing.assert_allclose(given, -sample.response_tokens / 100, rtol=1e-6)
    assert {body["logprob_start_len"] for body in sent} == {1}, "the prompts have two tokens"
    assert all(sample.teacher_log_probs is None for sample in evaluation.samples(Numbers()))


def test_a_teacher_that_stumbles_is_asked_again(engine: str) -> None:
    replies = iter([(503, b"busy"), (500, b"out of memory")])
    with service(lambda body: next(replies, None) or scored(body)) as (url, sent):
        rollout = rollout_for(1, scored=True, samples_per_prompt=1)
        sampler_for(engine, teacher=endpoint_of(settings(url, retries=2))).run(rollout)
    assert len(sent) == 3 and rollout.samples(Numbers())[0].teacher_log_probs is not None


def test_a_rollout_that_ends_does_not_wait_for_the_teacher_and_the_next_one_asks_again() -> None:
    answered_first, calls, ending = 3, itertools.count(), threading.Event()
    engine = StubEngine(keep_requests=True)

    def slow(body: dict[str, Any]) -> Reply:
        if next(calls) >= answered_first:
            ending.wait(60)
        return scored(body)

    with serving(engine) as url, service(slow) as (address, sent):
        teacher_there = endpoint_of(settings(address, timeout_seconds=60))
        rollout = rollout_for(2, scored=True)
        sampler = sampler_for(
            url,
            teacher=teacher_there,
            interrupted=lambda: len(sent) == 8 and rollout.finished == answered_first,
        )
        begun = time.monotonic()
        sampler.run(rollout)
        assert time.monotonic() - begun < 20, "it did not wait for the teacher"
        left = [m for group in rollout.groups for m in group.members if not m.finished]
        assert {(m.stopped, m.finish_reason, m.teacher_log_probs is None) for m in left} == {
            ("interrupted", "stop", True)
        }
        assert len(left) == 8 - answered_first
        ending.set()
        sampler_for(url, teacher=teacher_there).run(rollout)
    assert len(engine.requests) == 8, "what was sampled is scored, not sampled again"
    for sample in rollout.samples(Numbers()):
        assert sample.teacher_log_probs == pytest.approx(-sample.response_tokens / 100, rel=1e-6)


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((400, b"the input is longer than the context"), r"refuses \d+ tokens .*than the context.*max_res"),
        ((401, b"no key"), r"failed 2 times; last failure: HTTP 401: no key; is it running"),
        (answered([None, -1.0], [2, 9]), r"gave 1 log-probabilities for \d+ tokens"),
        ((200, {"text": "hello"}), r"failed 2 times; last failure: ValidationError"),
    ],
)  # fmt: skip
def test_a_teacher_that_gives_no_scores_ends_the_run_and_is_named(
    engine: str, reply: Reply, message: str
) -> None:
    with service(lambda _: reply) as (url, _):
        sampler = sampler_for(engine, teacher=endpoint_of(settings(url)))
        with pytest.raises(EngineError, match=f"the teacher http://127.0.0.1:.*{message}"):
            sampler.run(rollout_for(1, scored=True))


class Words:
    """A tokenizer of a few words."""

    def __init__(self, *words: str) -> None:
        self.words = words

    def __len__(self) -> int:
        return len(self.words)

    def decode(self, tokens: list[int], *, skip_special_tokens: bool) -> str:
        return "".join(self.words[token] for token in tokens)


def texts(*words: str) -> Any:
    """A server's /detokenize, as SGLang 0.5.23's: a number that is no token is its failure."""

    def answer(body: dict[str, Any]) -> Reply:
        assert body["skip_special_tokens"] is False
        if max(map(max, body["tokens"])) >= len(words):
            return 500, {"message": "Internal server error during detokenization"}
        return 200, {"text": ["".join(words[token] for token in tokens) for tokens in body["tokens"]]}

    return answer


def test_a_teacher_has_the_models_vocabulary_or_is_refused_before_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(teacher, "DECODED_TOGETHER", 2)
    ours = Words("a", "b", "<|end|>", "")
    for theirs, refusal in {
        ("a", "b", "<|end|>", "", "more"): None,
        ("a", "b", "c", ""): r"token 2 is '<\|end\|>' to the model, and 'c' to the teacher at http://127",
        ("a", "b"): r"gave no texts of tokens 2 to 3: HTTP 500: .*must have the model's vocabulary",
    }.items():
        with ExitStack() as stack, service(texts(*theirs), INFO) as (url, _):
            if refusal:
                stack.enter_context(pytest.raises(ConfigError, match=refusal))
            check_teacher(settings(url), ours)


def test_what_does_not_generate_text_or_does_not_answer_cannot_teach() -> None:
    with (
        service(texts("a"), {"is_generation": False}) as (url, _),
        pytest.raises(ConfigError, match="serves a model that does not generate text"),
    ):
        check_teacher(settings(url), Words("a"))
    with pytest.raises(PmdError, match=r"model_info does not answer as SGLang's does: ConnectError"):
        check_teacher(settings("http://127.0.0.1:9"), Words("a"))
    with service(texts("a"), ["no"]) as (url, _), pytest.raises(PmdError, match="does not answer as SGLang"):
        check_teacher(settings(url), Words("a"))


def test_the_key_comes_from_a_file_and_is_sent_as_a_bearers_token(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("sk-1\n")
    headers = endpoint_of(settings("http://here", key_file=str(tmp_path / "key"))).headers
    assert headers == {"Authorization": "Bearer sk-1"}
    with pytest.raises(ConfigError, match=r"algorithm\.teacher\.key_file: absent cannot be read"):
        endpoint_of(settings("http://here", key_file="absent"))


def test_the_page_on_teachers_prints_what_it_says(tmp_path: Path) -> None:
    expected = next(block.text for block in blocks("docs/teachers.md") if block.language == "text")
    assert follow("docs/teachers.md", tmp_path).endswith(expected)
