"""An agent's episode: which trajectory a request goes on with, and what a program has rewritten.

A program sends its whole history with every request. As far as that is what a trajectory has, the tokens of
the trajectory are used, exactly as they were sampled; only what the program has added is encoded. Elsewhere a
new trajectory begins. docs/agents.md has the rules.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_pmd.data.prompts import sample_seed
from megatron_pmd.errors import RequestRefused
from megatron_pmd.rollout.agents.model_output import OutputReader
from megatron_pmd.rollout.agents.protocol import ChatAnswer, ChatRequest, Message, RequestError
from megatron_pmd.rollout.agents.rendering import Renderer
from megatron_pmd.rollout.generate_client import GenerateClient, ResponseStopped
from megatron_pmd.rollout.groups import Accounts
from megatron_pmd.rollout.trajectory import INSERTED, Trajectory, Turn
from megatron_pmd.rollout.turn_sampler import Sampling, TurnSampler

FINISH = {"stop": "stop", "length": "length", "repetition": "length"}
"""OpenAI's word for each way in which a turn ends."""


@dataclass(eq=False)
class Conversation:
    """A trajectory, and the messages that its tokens stand for."""

    trajectory: Trajectory
    head: Any
    """Tools and template arguments: another head is another prompt."""
    keys: list[Any]
    """Of its messages, the model's answers among them."""
    sampled: dict[int, int]
    """From the place of a message to the turn that the model made it with."""

    def common(self, messages: Sequence[Message]) -> int:
        """Messages that both begin with."""
        places = zip(self.keys, messages, strict=False)
        return next(
            (place for place, (key, message) in enumerate(places) if key != message.key),
            min(len(self.keys), len(messages)),
        )


@dataclass(frozen=True)
class _Place:
    """Where a request goes on."""

    trajectory: Trajectory
    """With all that is in front of the new turn; not yet the episode's."""
    base: Conversation | None
    """Whose turns it begins with; None: it shares none."""
    kept: int
    """Messages of the base that it shares, up to a turn of the model."""

    @property
    def goes_on(self) -> bool:
        """Whether it makes the base longer; else it is a trajectory of its own."""
        return self.base is not None and self.kept == len(self.base.keys)


class AgentEpisode:
    """What one run of a program asks the model, as trajectories that share a reward."""

    def __init__(
        self,
        member: Trajectory,
        sampling: Sampling,
        client: GenerateClient,
        routing_key: str,
        accounts: Accounts,
        reader: OutputReader,
        max_prompt_tokens: int,
    ) -> None:
        """member: the first trajectory of the episode; others become its branches.

        What was sampled of it before is dropped: a program cannot go on where another run of it was ended.
        """
        accounts.dropped_tokens["begun_anew"] += member.episode_length
        member.turns, member.branches = [], []
        member.own_prompt = member.routed_experts = None
        self._member, self._sampling, self._client = member, sampling, client
        self._sampler = TurnSampler(sampling, client, accounts, routing_key)
        self._accounts, self._reader = accounts, reader
        self._max_prompt_tokens = max_prompt_tokens
        self._conversations: list[Conversation] = []
        self._asked = 0
        self._answering: set[asyncio.Task[Any]] = set()
        self._closed = False
        self.failed = asyncio.Event()
        self.failure: BaseException | None = None
        """What ended a request without the program's fault: the episode is to end with it."""
        self.refusal: RequestRefused | None = None
        """The last request that the engines would not answer, or that had no room before any was answered."""

    async def answer(self, request: ChatRequest) -> tuple[ChatAnswer, Turn]:
        """The model's turn, and where it is recorded. RequestError for a request that is not answered."""
        self._refuse_beyond_limits(request)
        self._note_rewritten(request)
        place, number = self._place(request), self._asked
        self._asked += 1
        candidate, turn = place.trajectory, Turn()
        candidate.turns.append(turn)
        task = asyncio.current_task()
        assert task is not None, "a request is answered in a task"
        self._answering.add(task)
        try:
            await self._sample(candidate, turn, request, number)
            if not len(turn.tokens):  # what the engines have no room for is refused as what we have none for
                raise self._no_room(place)
            answer = await self._read(candidate, turn, request, number)
        except BaseException:
            self._accounts.dropped_tokens["not_delivered"] += len(turn.tokens)
            raise
        finally:
            self._answering.discard(task)
        self._enter(place, request, answer)
        return answer, turn

    def note_undelivered(self, turn: Turn) -> None:
        """The program did not take all of an answer: what it never read is not trained on."""
        self._mask(turn, "undelivered_turns")

    async def close(self) -> None:
        """The program has ended: nothing is answered any more."""
        self._closed = True
        waiting = list(self._answering)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)

    def _refuse_beyond_limits(self, request: ChatRequest) -> None:
        if self._closed:
            raise RequestError("this episode has ended", status=410, code="episode_ended")
        if request.tools and self._reader.tool_parser is None:
            raise RequestError(
                "tools: this run does not say how its model writes calls; set rollout.agent.tool_parser",
                code="no_tool_parser",
            )
        if self._asked >= self._sampling.max_turns:
            raise RequestError(
                f"the episode has had its {self._sampling.max_turns} answers (rollout.max_turns)",
                code="turn_limit_exceeded",
            )

    def _note_rewritten(self, request: ChatRequest) -> None:
        """Mask the model's turns in whose place the program now sends something else.

        Not where it asks again for a turn, nor where it goes on with another answer to the same request.
        """
        common = [each.common(request.messages) for each in self._conversations]
        first_other = max(common, default=0)
        if first_other == len(request.messages):
            return
        reason = "edited_turns" if request.messages[first_other].role == "assistant" else "hidden_turns"
        for conversation, place in zip(self._conversations, common, strict=True):
            if place == first_other and place in conversation.sampled:
                self._mask(conversation.trajectory.turns[conversation.sampled[place]], reason)

    def _mask(self, turn: Turn, reason: str) -> None:
        if turn.counted and turn.finish != INSERTED:
            turn.counted = False
            self._accounts.agents[reason] += 1

    def _place(self, request: ChatRequest) -> _Place:
        """Where the request goes on: behind as many of the model's turns as it has kept."""
        arguments = self._member.problem.template_arguments | request.template_arguments
        renderer = Renderer(self._reader.tokenizer, request.tools, arguments)
        base, kept = self._nearest(request)
        if base is not None:
            turns = base.trajectory.turns[: base.sampled[kept - 1] + 1]
            last = next(iter(turns[-1].tokens[-1:].tolist()), None)
            added = renderer.continuation(request.messages, kept, last)
            if added is not None:
                place = _Place(self._begun(_as_context(turns), base.trajectory.own_prompt, added), base, kept)
                if place.goes_on:
                    place.trajectory.turns[: len(turns)] = turns
                self._refuse_without_room(place)
                return place
        tokens = renderer.prompt(request.messages)
        prompt = tuple(tokens[: self._max_prompt_tokens])
        own = None if prompt == self._member.problem.tokens else prompt
        place = _Place(self._begun([], own, tokens[len(prompt) :]), None, 0)
        self._refuse_without_room(place)
        return place

    def _nearest(self, request: ChatRequest) -> tuple[Conversation | None, int]:
        """The conversation that shares most of the model's turns with the request, and up to where it does.

        Of several, one that the request makes longer, else the oldest.
        """
        nearest: Conversation | None = None
        kept = 0
        for conversation in self._conversations:
            if conversation.head != _head(request):
                continue
            common = conversation.common(request.messages)
            shared = max((place + 1 for place in conversation.sampled if place < common), default=0)
            longer = shared == kept > 0 and shared == len(conversation.keys)
            if shared > kept or longer:
                nearest, kept = conversation, shared
        return nearest, kept

    def _begun(
        self, turns: list[Turn], own_prompt: tuple[int, ...] | None, added: Sequence[int]
    ) -> Trajectory:
        member = self._member
        turns = [*turns, Turn.insertion(added)] if added else list(turns)
        begun = Trajectory(member.problem, member.number, member.seed, turns)
        begun.own_prompt = own_prompt
        return begun

    def _refuse_without_room(self, place: _Place) -> None:
        if place.trajectory.length >= self._sampling.most_tokens(place.trajectory):
            raise self._no_room(place)

    def _no_room(self, place: _Place) -> RequestError:
        """For an answer. The trajectory that would go on was cut before its end; where there is none, the
        response cannot be begun, as where the engines refuse it."""
        most, length = self._sampling.most_tokens(place.trajectory), place.trajectory.length
        if place.goes_on and place.base is not None:
            place.base.trajectory.turns[-1].finish = "length"
        said = (
            f"the conversation has {length + len(place.trajectory.prompt)} tokens, and there is no room for "
            f"an answer: a trajectory may have {self._max_prompt_tokens} of a prompt and {most} behind it"
        )
        if not self._conversations:
            self.refusal = RequestRefused(said)
            self._accounts.note_refusal(said)
        return RequestError(said, code="context_length_exceeded")

    async def _sample(self, candidate: Trajectory, turn: Turn, request: ChatRequest, number: int) -> None:
        # Requests of one conversation may be the same: each has a seed of its own, or all draws were equal.
        seed = sample_seed(candidate.seed, 0, 0, number, "agent") if number else candidate.seed
        try:
            await self._sampler.finish(
                candidate, turn, max_tokens=request.max_tokens, stop=request.stop, seed=seed
            )
        except RequestRefused as refusal:
            self.refusal = refusal
            raise RequestError(str(refusal), code="context_length_exceeded") from refusal
        except (Exception, ResponseStopped) as failure:
            raise self._failed(failure) from failure

    def _failed(self, failure: BaseException) -> RequestError:
        """The episode ends with this; what the program is told meanwhile."""
        self.failure = failure
        self.failed.set()
        return RequestError(f"{type(failure).__name__}: {failure}", status=503)

    async def _read(self, candidate: Trajectory, turn: Turn, request: ChatRequest, number: int) -> ChatAnswer:
        tokens = turn.tokens
        if turn.finish == "stop" and len(tokens) and int(tokens[-1]) in self._sampling.stop_tokens:
            tokens = tokens[:-1]
        text = self._reader.text(tokens, with_tools=bool(request.tools))
        for stop in request.stop:
            text = text.partition(stop)[0]
        try:
            words = await self._reader.read(text, request.tools, self._client)
        except (Exception, ResponseStopped) as failure:
            raise self._failed(failure) from failure
        finish = FINISH[turn.finish or "length"]
        if words.calls and finish == "stop":
            finish = "tool_calls"
        context = len(candidate.prompt) + candidate.length - len(turn.tokens)
        name = f"{self._member.seed:x}-{number}"
        return ChatAnswer(name, words, finish, context, len(turn.tokens))

    def _enter(self, place: _Place, request: ChatRequest, answer: ChatAnswer) -> None:
        """The answer is made: it becomes part of the episode."""
        candidate = place.trajectory
        keys = [message.key for message in request.messages]
        own = ChatRequest.read({"messages": [answer.message]}).messages[0].key
        at = {len(keys): len(candidate.turns) - 1}
        base, self._accounts.agents["turns"] = place.base, self._accounts.agents["turns"] + 1
        if place.goes_on and base is not None:
            base.trajectory.turns = candidate.turns
            base.trajectory.routed_experts = candidate.routed_experts
            base.keys, base.sampled = [*keys, own], base.sampled | at
            self._accounts.inserted_tokens += sum(
                len(turn.tokens) for turn in candidate.turns[-2:-1] if turn.finish == INSERTED
            )
            return
        if base is not None:  # it may have become longer meanwhile
            shared = base.sampled[place.kept - 1] + 1
            candidate.turns[:shared] = _as_context(candidate.turns[:shared])
        if self._conversations:
            self._member.branches.append(candidate)
            self._accounts.agents["branches"] += 1
        else:
            member, made = self._member, candidate
            member.turns, member.own_prompt = made.turns, made.own_prompt
            member.routed_experts = made.routed_experts
            candidate = member
        self._conversations.append(Conversation(candidate, _head(request), [*keys, own], at))
        self._accounts.inserted_tokens += candidate.length - candidate.sampled_tokens


def _head(request: ChatRequest) -> Any:
    return request.tools, request.template_arguments


def _as_context(turns: Sequence[Turn]) -> list[Turn]:
    """The same tokens, turn by turn, in a trajectory that does not count them: another one has them."""
    return [Turn.insertion(turn.tokens) for turn in turns]
