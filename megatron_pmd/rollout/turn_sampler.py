"""A turn of the model: requests to the engines until it is finished, and what their answers add to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_pmd.config import Repetition
from megatron_pmd.errors import RequestRefused, StaleWeights
from megatron_pmd.rollout.engine_answer import EngineAnswer, recorded_experts
from megatron_pmd.rollout.generate_client import GenerateClient, ResponseStopped
from megatron_pmd.rollout.groups import Accounts
from megatron_pmd.rollout.trajectory import Trajectory, Turn, repeats

TOKEN_BUDGET = "token_budget"
"""Why a response was stopped that had used up rollout.partial.max_new_tokens."""


@dataclass(frozen=True)
class Sampling:
    """What all responses of a rollout have in common."""

    oldest_version: int
    newest_version: Callable[[], int]
    """Weights that engines may sample by: from the oldest up to those they have been given by now."""
    temperature: float
    top_p: float
    stop_tokens: list[int]
    max_response_tokens: int
    max_turns: int
    max_new_tokens: int | None
    """Of one response in this rollout."""
    repetition: Repetition | None
    routing_width: int
    """Experts that a token goes to, over all layers: the engines are asked which. 0: they are not."""

    def most_tokens(self, trajectory: Trajectory) -> int:
        """Of the whole response."""
        return min(trajectory.problem.token_budget or self.max_response_tokens, self.max_response_tokens)


class TurnSampler:
    """Has the engines make a response's turns."""

    def __init__(
        self, sampling: Sampling, client: GenerateClient, accounts: Accounts, routing_key: str
    ) -> None:
        self._sampling, self._client = sampling, client
        self._accounts, self._routing_key = accounts, routing_key
        self._new_tokens = 0

    async def finish(
        self,
        trajectory: Trajectory,
        turn: Turn,
        *,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        seed: int | None = None,
    ) -> str:
        """Ask until the last turn of the trajectory is finished; returns why it ended.

        max_tokens: of this turn. stop: texts that end it. seed: of this turn's draws; None: the trajectory's.
        Raises ResponseStopped when the rollout ends before, StaleWeights for a sample of other weights, and
        what GenerateClient.generate raises.
        """
        while turn.finish is None:
            await self._extend(trajectory, turn, max_tokens, stop, trajectory.seed if seed is None else seed)
        return turn.finish

    async def _extend(
        self, trajectory: Trajectory, turn: Turn, max_tokens: int | None, stop: Sequence[str], seed: int
    ) -> None:
        """One request, and what it says about whether the turn is finished."""
        sampling = self._sampling
        room = sampling.most_tokens(trajectory) - trajectory.length
        if max_tokens is not None:
            room = min(room, max_tokens - len(turn.tokens))
        limits = [room]
        if sampling.max_new_tokens is not None:
            limits.append(sampling.max_new_tokens - self._new_tokens)
        if sampling.repetition is not None:
            limits.append(sampling.repetition.window_tokens)
        if min(limits) <= 0:
            raise ResponseStopped(TOKEN_BUDGET)
        parameters: dict[str, Any] = {
            "max_new_tokens": min(limits),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "stop_token_ids": sampling.stop_tokens,
            "sampling_seed": seed,
        }
        if stop:
            parameters["stop"] = list(stop)
        newest = sampling.newest_version()
        request: dict[str, Any] = {
            "input_ids": trajectory.tokens,
            "sampling_params": parameters,
            "return_logprob": True,
            "return_routed_experts": sampling.routing_width > 0,
        }
        if self._client.endpoint.keeps_cache:
            # SGLang finds cached prefixes only of requests with the same key: none of earlier weights
            request["extra_key"] = str(newest)
        try:
            answer = await self._client.generate(request, self._routing_key)
        except RequestRefused as refusal:
            self._accounts.note_refusal(str(refusal))
            if not trajectory.sampled_tokens:
                raise
            turn.finish = "length"  # there is a response, which the engine cannot make longer
            return
        self._take(turn, answer, newest)
        turn.finish = self._finish(turn, answer, room, min(limits))
        cut = answer.finish_reason["type"] == "abort" and turn.finish is None
        # of all tokens so far, as each was computed; where it was cut the next answer has them again
        if answer.routed_experts and sampling.routing_width and not cut:
            tokens = len(trajectory.prompt) + trajectory.length
            trajectory.routed_experts = recorded_experts(
                answer.routed_experts, tokens, sampling.routing_width
            )
        if cut:
            raise ResponseStopped(self._client.stopping)

    def _finish(self, turn: Turn, answer: EngineAnswer, room: int, asked: int) -> str | None:
        """Why the turn has ended with this answer; None: it goes on.

        room: tokens that the turn could have had. asked: that this answer could have had.
        """
        sampling, reason = self._sampling, answer.finish_reason["type"]
        # SGLang makes one token more of what it aborts, and does not look whether that is the last
        # (managers/schedule_batch.py, update_finish_state)
        aborted = reason == "abort"
        if reason == "stop" or (aborted and len(answer.tokens) and answer.tokens[-1] in sampling.stop_tokens):
            return "stop"
        if sampling.repetition is not None and repeats(turn.tokens, sampling.repetition):
            return "repetition"
        # At the end of its context or cache an engine gives fewer than asked for, and then refuses to go on.
        if room <= len(answer.tokens) or (len(answer.tokens) < asked and not aborted):
            return "length"
        return None

    def _take(self, turn: Turn, answer: EngineAnswer, newest: int) -> None:
        """Add an engine's tokens to the turn.

        newest: the newest weights when the request was sent. Where an update keeps the cache, what other
        weights sampled may stand on a cache of these. SGLang does not tell: a request that had its prompt
        cached, and no token, lists the later weights alone.
        """
        start, last = 0, len(answer.spans) - 1
        # all of them before any token is taken: one that is refused is in no account
        versions = [self._checked(version) for _, version in answer.spans]
        for number, (tokens, _) in enumerate(answer.spans):
            end = None if number == last else start + tokens
            stale_cache = self._client.endpoint.keeps_cache and versions[number] != newest
            turn.extend(
                answer.tokens[start:end], answer.log_probs[start:end], versions[number],
                stale_cache=stale_cache,
            )  # fmt: skip
            start += tokens
        self._new_tokens += len(answer.tokens)
        self._accounts.sampled_tokens += len(answer.tokens)

    def _checked(self, version: str | None) -> int:
        oldest, newest = self._sampling.oldest_version, self._sampling.newest_version()
        if version is None or not version.isdecimal() or not oldest <= int(version) <= newest:
            expected = f"{oldest} to {newest}" if newest > oldest else f"{oldest}"
            raise StaleWeights(f"a sample came from weight version {version}, expected {expected}")
        return int(version)
