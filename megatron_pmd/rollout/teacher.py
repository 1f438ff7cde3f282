"""A teacher that SGLang serves: its log-probabilities of sampled tokens, and whether it can be one at all."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import httpx
import numpy as np

from megatron_pmd.config import Teacher
from megatron_pmd.errors import ConfigError, EngineError, PmdError, RequestRefused
from megatron_pmd.rewards.service import read_key
from megatron_pmd.rollout.generate_client import Endpoint, GenerateClient
from megatron_pmd.waiting import waiting_for

DECODED_TOGETHER = 4096
"""Tokens whose texts the server is asked for in one request, before which it answers no other."""


def endpoint_of(teacher: Teacher) -> Endpoint:
    """The teacher as what a GenerateClient asks. ConfigError where the file of its key has none."""
    url = teacher.url.rstrip("/")
    key = read_key(teacher.key_file, "algorithm.teacher.key_file")
    return Endpoint(
        router_url=url,
        engine_urls=[],  # nobody may abort what others have asked of it
        headers={"Authorization": f"Bearer {key}"} if key else {},
        request_timeout_seconds=teacher.timeout_seconds,
        retries=teacher.retries,
        any_engine_alive=_may_answer_again,
        max_in_flight=teacher.max_in_flight,
    )


def _may_answer_again() -> bool:
    """Nothing here could bring the teacher back: it is asked again, and then given up."""
    return True


class TeacherClient:
    """One rollout's questions to the teacher: `async with TeacherClient(endpoint) as teacher`."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._url, self._client = endpoint.router_url, GenerateClient(endpoint)

    async def __aenter__(self) -> Self:
        await self._client.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.__aexit__(kind, error, trace)

    def stop(self, reason: str) -> None:
        """The rollout ends: what the teacher has not answered is not waited for."""
        self._client.send_nothing_more(reason)

    async def log_probs(self, tokens: list[int], prompt_length: int, routing_key: str) -> np.ndarray:
        """fp32 [response]: log π_T of each token behind the prompt, at temperature 1.

        tokens: prompt and response. Raises EngineError when the teacher refuses them, fails `retries` times
        or answers something else, and ResponseStopped after stop().
        """
        return await self._client.unless_stopped(self._asked(tokens, prompt_length, routing_key))

    async def _asked(self, tokens: list[int], prompt_length: int, routing_key: str) -> np.ndarray:
        # the first of those that SGLang gives has no log-probability: it is the prompt's last
        start = prompt_length - 1
        request = {
            "input_ids": tokens,
            "sampling_params": {"max_new_tokens": 0},
            "return_logprob": True,
            "logprob_start_len": start,
        }
        try:
            answer = await self._client.generate(request, routing_key)
        except RequestRefused as refusal:
            raise EngineError(
                f"the teacher {self._url} refuses {len(tokens)} tokens of prompt and response: {refusal}; "
                "its context must be longer than batch.max_prompt_tokens + batch.max_response_tokens"
            ) from None
        except EngineError as error:
            raise EngineError(
                f"the teacher {self._url}: {error}; is it running, and is algorithm.teacher.timeout_seconds "
                "enough?"
            ) from None
        found = answer.prompt_log_probs[1:]
        if len(found) != len(tokens) - prompt_length or not np.isfinite(found).all():
            raise EngineError(
                f"the teacher {self._url} gave {np.isfinite(found).sum()} log-probabilities for "
                f"{len(tokens) - prompt_length} tokens; is it an SGLang server?"
            )
        return found


def check_teacher(teacher: Teacher, tokenizer: Any) -> None:
    """Whether the teacher answers, generates text, and has the tokenizer's vocabulary; asked before a run.

    Each token's text is compared: log-probabilities of token ids mean nothing under another vocabulary, and
    nothing else would tell. PmdError where no SGLang server answers, ConfigError for one that cannot teach.
    """
    endpoint = endpoint_of(teacher)
    with (
        waiting_for(f"the teacher {endpoint.router_url}", teacher.timeout_seconds),
        httpx.Client(timeout=teacher.timeout_seconds, trust_env=False, headers=endpoint.headers) as client,
    ):
        try:
            reply = client.get(f"{endpoint.router_url}/model_info")
            generates = reply.json()["is_generation"]
        except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
            raise PmdError(
                f"algorithm.teacher.url: {endpoint.router_url}/model_info does not answer as SGLang's does: "
                f"{type(error).__name__}: {error}; is the server running, and the key right?"
            ) from None
        if not generates:
            raise ConfigError(
                f"algorithm.teacher.url: {endpoint.router_url} serves a model that does not generate text"
            )
        for first in range(0, len(tokenizer), DECODED_TOGETHER):
            tokens = range(first, min(first + DECODED_TOGETHER, len(tokenizer)))
            ours = [tokenizer.decode([token], skip_special_tokens=False) for token in tokens]
            theirs = _texts(client, endpoint.router_url, tokens)
            for token, our, their in zip(tokens, ours, theirs, strict=True):
                if our != their:
                    raise ConfigError(
                        f"algorithm.teacher.url: token {token} is {our!r} to the model, and {their!r} to the "
                        f"teacher at {endpoint.router_url}; a teacher must have the model's vocabulary"
                    )


def _texts(client: httpx.Client, url: str, tokens: range) -> list[str]:
    """What the server's tokenizer makes of each token."""
    body = {"tokens": [[token] for token in tokens], "skip_special_tokens": False}
    try:
        reply = client.post(f"{url}/detokenize", json=body)
        texts = reply.json()["text"] if reply.status_code == 200 else None
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        raise PmdError(f"algorithm.teacher.url: {url}/detokenize: {type(error).__name__}: {error}") from None
    if not isinstance(texts, list) or len(texts) != len(tokens):
        raise ConfigError(
            f"algorithm.teacher.url: {url}/detokenize gave no texts of tokens {tokens[0]} to {tokens[-1]}: "
            f"HTTP {reply.status_code}: {reply.text[:200]}; a teacher must have the model's vocabulary"
        )
    return texts
