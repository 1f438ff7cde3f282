"""The groups of a played run: begun, complete, taken for a rollout, and kept in a checkpoint."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_pmd.simulator.accounts import Accounts
from megatron_pmd.simulator.lengths import Lengths
from megatron_pmd.simulator.scenario import Rules

Record = tuple[int, Sequence[tuple[int, float, int]]]
"""A group in a checkpoint: prompt tokens, and of each response: tokens, those decoded, version."""


@dataclass(eq=False, slots=True)
class Response:
    group: Group
    tokens: int
    """Of the whole response."""
    done: float = 0.0
    """Decoded so far, as far as they are kept."""
    goal: float = 0.0
    """Decoded of it when the engine lets it go."""
    version: int = 0
    """The weights that its first token is of."""

    @property
    def finished(self) -> bool:
        return self.done >= self.tokens


@dataclass(eq=False, slots=True)
class Group:
    prompt_tokens: int
    responses: list[Response] = field(default_factory=list)
    unfinished: int = 0

    @property
    def tokens(self) -> int:
        """Of its responses."""
        return sum(response.tokens for response in self.responses)


class Groups:
    """Those in the run, begun first before others."""

    def __init__(self, rules: Rules, lengths: Lengths, chance: random.Random) -> None:
        self._rules, self._lengths, self._chance = rules, lengths, chance
        self._groups: list[Group] = []
        self.complete = 0
        self._due: set[int] = set()

    def __len__(self) -> int:
        return len(self._groups)

    def begin(self, count: int, accounts: Accounts) -> list[Response]:
        """New groups behind all others; returns their responses."""
        begun: list[Response] = []
        for _ in range(count):
            prompt, lengths = self._lengths.draw(self._chance, self._rules.samples_per_prompt)
            group = Group(prompt, unfinished=len(lengths))
            group.responses = [Response(group, tokens) for tokens in lengths]
            self._groups.append(group)
            begun += group.responses
        accounts.started += len(begun)
        return begun

    def begin_stale_anew(self, version: int, accounts: Accounts) -> None:
        """rollout.partial.max_staleness: a response that is older is thrown away and sampled anew."""
        most = self._rules.partial.max_staleness if self._rules.partial else version
        for group in self._groups:
            for place, response in enumerate(group.responses):
                if response.done and response.version < version - most:
                    accounts.dropped += 1
                    accounts.dropped_tokens += response.done
                    accounts.started += 1
                    if response.finished:
                        self.complete -= group.unfinished == 0
                        group.unfinished += 1
                    anew = self._lengths.draw(self._chance, 1)[1][0]
                    group.responses[place] = Response(group, anew)

    @property
    def open(self) -> list[Response]:
        """Responses that are not finished."""
        return [r for group in self._groups for r in group.responses if not r.finished]

    def note_due(self) -> None:
        """From now on the groups that were begun first are due, as many as a rollout has."""
        first = self._groups[: self._rules.prompts_per_rollout]
        self._due = {id(group) for group in first if group.unfinished}

    @property
    def are_due_complete(self) -> bool:
        return not self._due

    def note_end(self, response: Response) -> None:
        """A response's engine has let it go."""
        group = response.group
        if response.finished:
            group.unfinished -= 1
            if not group.unfinished:
                self.complete += 1
                self._due.discard(id(group))

    def take(self) -> list[Group]:
        """A rollout: complete groups, those begun first before others, in whole optimizer steps."""
        wanted, step = self._rules.prompts_per_rollout, self._rules.prompts_per_step
        taken = [group for group in self._groups if not group.unfinished][:wanted]
        if len(taken) < wanted:
            taken = taken[: len(taken) // step * step]
        chosen = set(map(id, taken))
        self._groups = [group for group in self._groups if id(group) not in chosen]
        self.complete -= len(taken)
        return taken

    @property
    def kept_tokens(self) -> float:
        """Decoded of all responses."""
        return sum(response.done for group in self._groups for response in group.responses)

    @property
    def records(self) -> list[Record]:
        return [
            (group.prompt_tokens, [(r.tokens, r.done, r.version) for r in group.responses])
            for group in self._groups
        ]

    def restore(self, records: Sequence[Record]) -> None:
        """Have the groups of a checkpoint in the place of these.

        Of overlapped runs it has what is finished; the rest is sampled again.
        """
        keeps_all = self._rules.staleness is None
        self._groups = []
        for prompt_tokens, responses in records:
            group = Group(prompt_tokens)
            group.responses = [
                Response(group, tokens, done if keeps_all or done >= tokens else 0.0, tokens, version)
                for tokens, done, version in responses
            ]
            group.unfinished = sum(not response.finished for response in group.responses)
            self._groups.append(group)
        self.complete = sum(not group.unfinished for group in self._groups)
