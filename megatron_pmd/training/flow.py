"""Where every response and token of a run that samples ahead is, from one iteration to the next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from megatron_pmd.errors import RolloutError
from megatron_pmd.rollout.groups import Group, RolloutGroups
from megatron_pmd.rollout.trajectory import Trajectory

CAME = ("carried", "started")
"""Begun before this process, or by it."""


@dataclass
class Flow:
    """What came (CAME) and where it is: `trained`, `waiting` in complete groups, `in_flight`, `kept` of a
    rollout that was cut short, or `dropped_REASON` (Accounts.dropped). Counted since the run was started."""

    responses: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: Flow) -> Flow:
        return Flow(self.responses + other.responses, self.tokens + other.tokens)

    def put(self, where: str, members: Iterable[Trajectory]) -> None:
        for member in members:
            self.responses[where] += 1
            self.tokens[where] += member.episode_length

    @classmethod
    def of(cls, rollout: RolloutGroups, *, taken: bool) -> Flow:
        """Of one rollout, which is handed over for training, or under way."""
        flow = cls.dropped(rollout)
        accounts = rollout.accounts
        began = accounts.sampled_tokens + accounts.inserted_tokens + accounts.restored_tokens
        flow.responses["carried"], flow.responses["started"] = accounts.carried, accounts.started
        flow.tokens["carried"], flow.tokens["started"] = accounts.carried_tokens, began
        if taken:
            flow.put("trained", _members(rollout.chosen))
            flow.put("kept", _members(rollout.left_over))
        else:
            flow.put("waiting", _members(group for group in rollout.groups if group.complete))
            flow.put("in_flight", _members(group for group in rollout.groups if not group.complete))
        return flow

    @classmethod
    def dropped(cls, rollout: RolloutGroups) -> Flow:
        """What a rollout has dropped by now, as if it had begun nothing else."""
        flow, accounts = cls(), rollout.accounts
        for counts, dropped in (
            (flow.responses, accounts.dropped),
            (flow.tokens, accounts.dropped_tokens),
        ):
            counts.update({f"dropped_{reason}": count for reason, count in dropped.items()})
            counts["started"] = dropped.total()
        return flow

    @classmethod
    def carried(cls, groups: Iterable[Group]) -> Flow:
        """Of groups that no rollout of this process has begun to work on."""
        flow = cls()
        for group in groups:
            flow.put("carried", group.members)
            flow.put("waiting" if group.complete else "in_flight", group.members)
        return flow

    def check(self, *, answers_under_way: bool) -> None:
        """RolloutError unless all that came is in one place.

        answers_under_way: an agent's program is given an answer before its tokens are part of a response, so
        that those which are neither here nor dropped are in flight.
        """
        if answers_under_way:
            self.tokens["in_flight"] += max(0, self._came(self.tokens) - self._is(self.tokens))
        for unit, counts in (("responses", self.responses), ("tokens", self.tokens)):
            if self._came(counts) != self._is(counts):
                raise RolloutError(
                    f"{unit} that were sampled ahead were lost or counted twice: {self._came(counts)} came "
                    f"and {self._is(counts)} are there or dropped: {dict(counts)}"
                )

    def check_handed_over(self, received: Flow) -> None:
        """RolloutError unless what is trained on by this account is what the driver has received."""
        for unit in ("responses", "tokens"):
            here, there = getattr(self, unit)["trained"], getattr(received, unit)["trained"]
            if here != there:
                raise RolloutError(f"the sampler handed over {here} {unit} so far, the driver got {there}")

    @staticmethod
    def _came(counts: Counter[str]) -> int:
        return sum(counts[name] for name in CAME)

    @staticmethod
    def _is(counts: Counter[str]) -> int:
        return counts.total() - Flow._came(counts)

    def values(self) -> dict[str, float]:
        """For metrics.jsonl."""
        units = {"responses": self.responses, "tokens": self.tokens}
        return {f"ahead/{n}_{unit}": float(v) for unit, counts in units.items() for n, v in counts.items()}


def _members(groups: Iterable[Group]) -> Iterable[Trajectory]:
    return (member for group in groups for member in group.members)
