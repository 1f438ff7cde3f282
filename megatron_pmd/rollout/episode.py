"""What a rollout function works with: one response, of engine answers and what is inserted between them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from megatron_pmd.data.problems import Problem
from megatron_pmd.errors import RolloutError
from megatron_pmd.plugins import load
from megatron_pmd.rollout.generate_client import GenerateClient
from megatron_pmd.rollout.groups import Accounts
from megatron_pmd.rollout.trajectory import INSERTED, Trajectory, Turn
from megatron_pmd.rollout.turn_sampler import Sampling, TurnSampler


@dataclass(frozen=True)
class Answer:
    """One turn of the model."""

    tokens: list[int]
    text: str
    """Without special tokens."""
    finish: str
    """`stop`: it ended its turn. `length`, `repetition`: it was cut; nothing should follow."""


class Episode:
    """One response. A rollout function calls generate() and insert() and returns the text to be graded.

    A stopped response is continued in a later iteration by calling the function again: up to where it was
    stopped, generate() and insert() then give what they gave before, without asking an engine or running a
    tool. So the function must do the same again, and call its tools through insert() or insert_message().
    """

    def __init__(
        self,
        trajectory: Trajectory,
        sampling: Sampling,
        client: GenerateClient,
        tokenizer: Any,
        accounts: Accounts,
        routing_key: str,
    ) -> None:
        self._trajectory, self._sampling = trajectory, sampling
        self._tokenizer, self._accounts = tokenizer, accounts
        self._sampler = TurnSampler(sampling, client, accounts, routing_key)
        self._cursor = 0
        self._answers = 0
        self._first_text = ""
        self.failure: Exception | None = None
        """What went wrong in generate(): no fault of the function, whatever it makes of it."""

    @property
    def problem(self) -> Problem:
        return self._trajectory.problem

    @property
    def can_go_on(self) -> bool:
        """Whether there is room for another answer: in tokens, and in rollout.max_turns."""
        passed = sum(len(turn.tokens) for turn in self._trajectory.turns[: self._cursor])
        return passed < self._max_tokens and self._answers < self._sampling.max_turns

    @property
    def _max_tokens(self) -> int:
        return self._sampling.most_tokens(self._trajectory)

    async def generate(self) -> Answer:
        """The model's next turn; empty, with finish `length`, if there is no room for one."""
        if not self.can_go_on:
            return Answer([], "", "length")
        turn = self._next(inserted=False)
        self._answers += 1
        try:
            finish = await self._sampler.finish(self._trajectory, turn)
        except Exception as error:
            self.failure = error
            raise
        # an array: transformers looks at each entry of a list, which takes longer than the decoding
        text = self._tokenizer.decode(turn.tokens, skip_special_tokens=True)
        if self._cursor == 1:
            self._first_text = text
        return Answer(turn.tokens.tolist(), text, finish)

    async def insert(self, text: str | Callable[[], Awaitable[str]]) -> None:
        """Put text behind the response so far; its tokens are in the model's context and not in the loss.

        text: or what makes it, awaited only the first time. Special tokens in it are recognised. What does
        not fit into the response is cut, and generate() then has no room.
        """
        if self._cursor < len(self._trajectory.turns):
            self._next(inserted=True)
            return
        content = text if isinstance(text, str) else await text()
        tokens = self._tokenizer.encode(content, add_special_tokens=False)
        self._insert_tokens(tokens)

    async def insert_message(self, role: str, content: str | Callable[[], Awaitable[str]]) -> None:
        """Put a chat message behind the model's turn, by the chat template, and open its next turn."""
        if self._cursor < len(self._trajectory.turns):
            self._next(inserted=True)
            return
        text = content if isinstance(content, str) else await content()
        message = message_text(self._tokenizer, role, text, **self.problem.template_arguments)
        tokens = self._tokenizer.encode(message, add_special_tokens=False)
        last = self._trajectory.turns[-1].tokens[-1:].tolist() if self._trajectory.turns else []
        if tokens and tokens[:1] == last:  # the model has ended its turn itself
            tokens = tokens[1:]
        self._insert_tokens(tokens)

    def _insert_tokens(self, tokens: list[int]) -> None:
        room = self._max_tokens - self._trajectory.length
        self._trajectory.turns.append(Turn.insertion(tokens[:room]))
        self._accounts.inserted_tokens += len(tokens[:room])
        self._cursor += 1

    def close(self) -> None:
        """The function has returned: an insertion that no turn followed is no part of the response."""
        turns = self._trajectory.turns
        cut = bool(turns) and turns[-1].finish == INSERTED and self._trajectory.length >= self._max_tokens
        while turns and turns[-1].finish == INSERTED:
            self._accounts.inserted_tokens -= len(turns.pop().tokens)
        if cut and turns:
            turns[-1].finish = "length"

    @property
    def response_text(self) -> str:
        """All of the response, decoded without special tokens; once it is closed."""
        trajectory = self._trajectory
        if len(trajectory.turns) == 1 and self._answers:  # then it is decoded already
            return self._first_text
        return self._tokenizer.decode(trajectory.response_tokens, skip_special_tokens=True)

    def _next(self, *, inserted: bool) -> Turn:
        """The turn the function has come to: one of before, or a new one."""
        turns = self._trajectory.turns
        if self._cursor == len(turns):
            turns.append(Turn())
        turn = turns[self._cursor]
        if (turn.finish == INSERTED) != inserted:
            raise RolloutError(
                f"the rollout function did not repeat itself on problem {self.problem.index}: turn "
                f"{self._cursor} of the continued response was {'sampled' if inserted else 'inserted'} before"
            )
        self._cursor += 1
        return turn


RolloutFunction = Callable[[Episode], Awaitable[str]]


async def single_turn(episode: Episode) -> str:
    """The default: one answer, graded as it is."""
    return (await episode.generate()).text


def rollout_function(name: str | None) -> RolloutFunction:
    """The function that rollout.function names. ConfigError if it cannot be loaded."""
    return single_turn if name is None else load(name, what="rollout.function")


def message_text(tokenizer: Any, role: str, content: str, /, **template_arguments: Any) -> str:
    """What the chat template writes after an assistant's words when a message follows and it is asked again.

    Raises RolloutError if the template does not keep what went before as it was.
    """
    words = "assistant-words-6f1d"
    conversation = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": words},
        {"role": role, "content": content},
    ]
    try:
        rendered = tokenizer.apply_chat_template(
            conversation, add_generation_prompt=True, tokenize=False, **template_arguments
        )
    except Exception as error:  # jinja's, or whatever the template's own code leads to
        raise RolloutError(f"the chat template refuses a message of role {role!r}: {error}") from error
    _, found, after = rendered.partition(words)
    if not found:
        raise RolloutError(f"the chat template drops an assistant's words before a message of role {role!r}")
    return after
