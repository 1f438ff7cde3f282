"""The groups of a rollout: what to draw, what has been drawn, and what the next rollout goes on with."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_pmd.batch import Sample
from megatron_pmd.config import GroupFilter, PartialRollouts
from megatron_pmd.data.problems import Problem
from megatron_pmd.data.prompts import sample_seed
from megatron_pmd.errors import EngineError, RolloutError
from megatron_pmd.rollout.trajectory import Trajectory, Turn

Shaping = Callable[[Sequence[Trajectory]], Sequence[float]]
"""From the graded responses of one group to the rewards that are trained on."""


def graders_rewards(members: Sequence[Trajectory]) -> Sequence[float]:
    """Nothing is added to them, nothing taken."""
    return [member.reward or 0.0 for member in members]


@dataclass
class Group:
    """All responses to one prompt: together for their baseline, and for the engines' prefix cache."""

    begun: int
    """Iteration in which it was first sampled."""
    place: int
    """Which of the groups begun in that iteration, from 0."""
    problem: Problem
    members: list[Trajectory]

    @property
    def complete(self) -> bool:
        return all(member.finished for member in self.members)

    @property
    def settled(self) -> bool:
        """Whether nothing more will come of it in this rollout."""
        return all(member.finished or member.refused for member in self.members)

    @property
    def key(self) -> str:
        return f"{self.begun}-{self.place}"

    def has_signal(self, rule: GroupFilter, shaping: Shaping) -> bool:
        """Whether the filter lets it through; only for a complete group."""
        rewards = shaping(self.members)
        mean = sum(rewards) / len(rewards)
        return not (
            (rule.drop_equal_rewards and min(rewards) == max(rewards))
            or (rule.mean_reward_above is not None and mean <= rule.mean_reward_above)
            or (rule.mean_reward_below is not None and mean >= rule.mean_reward_below)
        )


@dataclass
class Accounts:
    """Every response and every token of one rollout: what came in must be what went out.

    Counted when it happens, and compared by check() with what is there in the end.
    """

    carried: int = 0
    """Responses carried over from the last rollout, with `carried_tokens`."""
    started: int = 0
    carried_tokens: int = 0
    sampled_tokens: int = 0
    """As the engines' answers came in."""
    inserted_tokens: int = 0
    restored_tokens: int = field(default=0, init=False)
    """Of groups that a process before this one has completed (GroupJournal)."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Responses thrown away, by reason: `stale`, `group_filter`, `refused`."""
    dropped_tokens: Counter[str] = field(default_factory=Counter)
    """By the same reasons. Without their response: `begun_anew`, `not_delivered` (docs/agents.md), and
    `refused` in an evaluation."""
    agents: Counter[str] = field(default_factory=Counter, init=False)
    """What became of the turns that agents' programs asked for: see rollout/agents/conversations.py."""
    filter_passed: int = 0
    """Groups that the filter would have dropped beyond its limit."""
    refusals: int = 0
    """Requests that the engines would not answer, and first ones of programs for which there is no room."""
    first_refusal: str = ""
    """Why, of the first one; or why the first response that was not begun was not."""

    def note_refusal(self, reason: str) -> None:
        """To be called once for each of `refusals`."""
        self.first_refusal = self.first_refusal or reason
        self.refusals += 1

    def drop(self, members: Sequence[Trajectory], reason: str) -> None:
        self.dropped[reason] += len(members)
        self.dropped_tokens[reason] += sum(member.episode_length for member in members)

    def check(self, finished: Sequence[Trajectory], left_over: Sequence[Trajectory]) -> None:
        """RolloutError unless carried + started = finished + left over + dropped: responses and tokens."""
        came = self.carried + self.started
        went = len(finished) + len(left_over) + self.dropped.total()
        came_tokens = self.carried_tokens + self.sampled_tokens + self.inserted_tokens + self.restored_tokens
        went_tokens = sum(t.episode_length for t in (*finished, *left_over)) + self.dropped_tokens.total()
        if came != went or came_tokens != went_tokens:
            raise RolloutError(
                f"responses were lost or counted twice: {self.carried} carried + {self.started} started, "
                f"but {len(finished)} finished + {len(left_over)} left over + {dict(self.dropped)} dropped; "
                f"in tokens {self.carried_tokens} + {self.sampled_tokens} sampled + {self.inserted_tokens} "
                f"inserted + {self.restored_tokens} restored, but {went_tokens} in all"
            )


@dataclass(frozen=True)
class DrawSettings:
    """How all responses of a rollout are sampled, and what their seeds follow from."""

    samples_per_prompt: int
    iteration: int
    weight_version: int
    """The oldest weights that may sample for it; without rollout.staleness, the only ones."""
    temperature: float
    top_p: float
    run_seed: int
    stream: str = "train"
    """Separates the seeds of training and evaluation."""
    scored: bool = False
    """Whether a teacher, where there is one, scores the responses."""


@dataclass(frozen=True)
class EndRules:
    """When a rollout has what it is to have, and when it may end with less."""

    wanted: int | None = None
    """Groups that a complete rollout has; None: all."""
    groups_per_step: int = 1
    """A rollout that ends early has a multiple of so many."""
    partial: PartialRollouts | None = None
    group_filter: GroupFilter | None = None
    shaping: Shaping = graders_rewards
    """Whose rewards the filter looks at."""


ALL_GROUPS = EndRules()


class RolloutGroups:
    """What to draw, and what has been drawn so far; survives the loss of engines.

    With `partial`, a rollout ends before all its groups are complete, and what is unfinished is `left_over`.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        settings: DrawSettings,
        rules: EndRules = ALL_GROUPS,
        *,
        next_problem: Callable[[], Problem] | None = None,
        carried_over: Sequence[Group] = (),
    ) -> None:
        """problems: one new group each.

        next_problem: for the group in a dropped one's place; the filter needs it. None: what the engines
        refuse counts as a response worth 0.
        carried_over: from the last rollout; these come first.
        """
        self.settings, self.rules = settings, rules
        self._next_problem = next_problem
        # a rollout that was interrupted goes on with groups of its own iteration: new ones count on from them
        own = (group.place for group in carried_over if group.begun == settings.iteration)
        self._begun = 1 + max(own, default=-1)
        self._dropped: list[Group] = []
        self._ends: float | None = None
        self.accounts = Accounts()
        self.groups: list[Group] = list(carried_over)
        """All that were not dropped, in the order they are sampled."""
        self._take_over()
        self.complete_groups = sum(group.complete for group in self.groups)
        for problem in problems:
            self.begin(problem)

    def __getstate__(self) -> dict[str, Any]:
        """What goes to another process; there it can no longer replace a group."""
        return {**self.__dict__, "_next_problem": None}

    def _take_over(self) -> None:
        """Enter what was carried over; a response that is too old for this rollout starts anew.

        So do all of a group that has ended and of which nothing would count: it waited to teach nothing.
        """
        members = [member for group in self.groups for member in group.members]
        self.accounts.carried = len(members)
        self.accounts.carried_tokens = sum(member.episode_length for member in members)
        for group in self.groups:
            lost = all(member.ended for member in group.members) and not any(
                segment.counted for member in group.members for segment in member.segments(self._counted_from)
            )
            for number, member in enumerate(group.members):
                if lost or self._stale(member):
                    group.members[number] = self._begin(group, number, "restarted")
                    self.accounts.drop([member], "stale")

    def begin(self, problem: Problem) -> Group:
        """A new group, behind all others."""
        group = Group(self.settings.iteration, self._begun, problem, [])
        self._begun += 1
        group.members = [self._begin(group, number) for number in range(self.settings.samples_per_prompt)]
        self.groups.append(group)
        return group

    def _begin(self, group: Group, number: int, stream: str = "") -> Trajectory:
        self.accounts.started += 1
        settings = self.settings
        stream = "/".join(filter(None, (settings.stream, stream, group.key if stream else "")))
        seed = sample_seed(settings.run_seed, settings.iteration, group.place, number, stream)
        return Trajectory(group.problem, number, seed)

    @property
    def _counted_from(self) -> int:
        """The oldest weights whose tokens are in the loss."""
        partial = self.rules.partial
        return self.settings.weight_version if partial and not partial.count_earlier_segments else 0

    def _stale(self, member: Trajectory) -> bool:
        first, partial = member.first_version, self.rules.partial
        return (
            partial is not None
            and first is not None
            and first < self.settings.weight_version - partial.max_staleness
        )

    def refuse(self, member: Trajectory, reason: str, worth: float = 0.0) -> None:
        """To be called for a response that cannot be begun. An evaluation counts it as wrong.

        worth: its reward there. reason: of the engines, whose refusal is noted already, or of the agent's
        program.
        """
        self.accounts.first_refusal = self.accounts.first_refusal or reason
        if self._next_problem is None:
            # a rollout function may have inserted something before it asked
            self.accounts.dropped_tokens["refused"] += member.episode_length
            member.turns = [Turn(finish="length")]
            member.reward, member.reward_error = worth, reason
        else:
            member.refused = True

    def settled(self, group: Group) -> Group | None:
        """To be called when a group is settled. It counts (None), or the returned new group replaces it.

        Raises EngineError when more groups than the rollout wants could not be begun, and none is complete.
        """
        if not group.complete:
            self.accounts.drop(group.members, "refused")
            dropped = self.accounts.dropped["refused"] // self.settings.samples_per_prompt
            if not self.complete_groups and dropped > self._wanted:
                raise EngineError(f"no prompt could be begun: {self.accounts.first_refusal}")
            return self._replace(group)
        rule = self.rules.group_filter
        if rule is None or group.has_signal(rule, self.rules.shaping):
            self.complete_groups += 1
            return None
        if self.accounts.dropped["group_filter"] >= rule.max_dropped * self.settings.samples_per_prompt:
            self.accounts.filter_passed += 1
            self.complete_groups += 1
            return None
        self.accounts.drop(group.members, "group_filter")
        self._dropped.append(group)
        return self._replace(group)

    def restore(self, group: Group, members: list[Trajectory]) -> Group | None:
        """Give an open group its responses, which are complete; returns as settled()."""
        before = sum(member.episode_length for member in group.members)
        self.accounts.restored_tokens += sum(member.episode_length for member in members) - before
        group.members = members
        return self.settled(group)

    def _replace(self, group: Group) -> Group:
        assert self._next_problem is not None, "a rollout that drops groups knows where further problems are"
        self.groups.remove(group)
        return self.begin(self._next_problem())

    @property
    def total(self) -> int:
        """Responses of all groups, finished or not."""
        return sum(len(group.members) for group in self.groups)

    @property
    def finished(self) -> int:
        """Responses that are graded, of all groups."""
        return sum(member.finished for group in self.groups for member in group.members)

    @property
    def _wanted(self) -> int:
        return len(self.groups) if self.rules.wanted is None else self.rules.wanted

    @property
    def is_full(self) -> bool:
        """Whether enough groups are complete."""
        return self.complete_groups >= self._wanted

    @property
    def may_end(self) -> bool:
        """Whether the rollout could end now, if it had to."""
        rules = self.rules
        return self.is_full or (rules.partial is not None and self.complete_groups >= rules.groups_per_step)

    def seconds_left(self) -> float | None:
        """Until the deadline, which runs from the first call; None: there is none."""
        partial = self.rules.partial
        if partial is None or partial.deadline_seconds is None:
            return None
        if self._ends is None:
            self._ends = time.monotonic() + partial.deadline_seconds
        return max(0.0, self._ends - time.monotonic())

    @property
    def chosen(self) -> list[Group]:
        """The groups of the rollout: complete, those begun first before others, in whole optimizer steps."""
        complete = [group for group in self.groups if group.complete][: self._wanted]
        if len(complete) < self._wanted:
            step = self.rules.groups_per_step
            complete = complete[: len(complete) // step * step]
        return complete

    @property
    def left_over(self) -> list[Group]:
        """What the next rollout goes on with."""
        chosen = {id(group) for group in self.chosen}
        return [group for group in self.groups if id(group) not in chosen]

    def check(self) -> None:
        """The accounting invariant; see Accounts.check."""
        finished = [member for group in self.chosen for member in group.members]
        self.accounts.check(finished, [member for group in self.left_over for member in group.members])

    def samples(self, tokenizer: Any) -> list[Sample]:
        """The rollout: the groups in `chosen`, numbered from 0."""
        return self._samples(self.chosen, tokenizer)

    def dropped_samples(self, tokenizer: Any) -> list[Sample]:
        """What the filter dropped: it says something about the problems, too."""
        return self._samples(self._dropped, tokenizer)

    def _samples(self, groups: list[Group], tokenizer: Any) -> list[Sample]:
        version, oldest = self.settings.weight_version, self._counted_from
        samples = []
        for index, group in enumerate(groups):
            # one text and one array for all of a group
            prompt = tokenizer.decode(group.problem.tokens), np.array(group.problem.tokens, np.int32)
            for member in group.members:
                for branch, part in enumerate(member.parts):
                    if branch and not any(segment.counted for segment in part.segments(oldest)):
                        continue  # nothing of it is trained on; the first one is there for the reward
                    own = part.own_prompt
                    at = prompt if own is None else (tokenizer.decode(own), np.array(own, np.int32))
                    samples.append(_sample(index, branch, *at, part, version, oldest))
        return samples


def _sample(
    index: int,
    branch: int,
    prompt: str,
    prompt_tokens: np.ndarray,
    member: Trajectory,
    weight_version: int,
    counted_from: int,
) -> Sample:
    last, problem = member.last_version, member.problem
    return Sample(
        group=index,
        number=member.number,
        branch=branch,
        source=problem.source,
        problem=problem.index,
        prompt=prompt,
        response=member.response,
        answer=problem.answer,
        prompt_tokens=prompt_tokens,
        response_tokens=member.response_tokens,
        engine_log_probs=member.log_probs,
        finish_reason=member.finish_reason,
        weight_version=weight_version if last is None else last,
        seed=member.seed,
        reward=member.reward or 0.0,
        reward_error=member.reward_error,
        segments=member.segments(counted_from),
        routed_experts=member.routed_experts,
        teacher_log_probs=member.teacher_log_probs,
    )
