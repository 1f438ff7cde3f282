"""Rollouts sampled ahead of training: which are begun when, and what is there when one is taken.

With rollout.staleness=n the rollout of iteration k is begun once the engines have weights k − n or newer, and
the trainer takes the rollouts in their order. So no sample is trained on more than n iterations after it was
begun, at most (n + 1) · prompts_per_rollout groups are in flight or wait, and nothing is sampled in vain.
Short responses do not come before long ones: a rollout is taken when all its groups are complete.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_pmd.config import RunConfig
from megatron_pmd.data.prompts import PromptOrder
from megatron_pmd.errors import EnginesLost, StaleWeights
from megatron_pmd.rollout.generate_client import Endpoint
from megatron_pmd.rollout.group_journal import GroupJournal
from megatron_pmd.rollout.groups import Group, RolloutGroups
from megatron_pmd.rollout.metrics import success_rates
from megatron_pmd.rollout.sampler import Grader, OnSample, Sampler
from megatron_pmd.rollout.trajectory import Trajectory
from megatron_pmd.training.flow import Flow
from megatron_pmd.training.rollouts import train_rollout
from megatron_pmd.training.subproblem import Subproblem


@dataclass
class Ahead:
    """What stands for later iterations: enough to go on from in another process, or from a checkpoint."""

    first: int
    """Iteration of the rollout that is taken next."""
    prompts: dict[str, Any]
    """PromptOrder.state() behind these groups."""
    groups: list[Group]
    flow: Flow = field(default_factory=Flow)
    """Of all else since the run was started: what is trained on or dropped."""


MENDED = EnginesLost, StaleWeights
"""What ends a drawing, and is no more when weights are published again."""


class Production:
    """All rollouts that are begun and not taken. Lives in one asyncio loop."""

    def __init__(
        self,
        config: RunConfig,
        prompts: PromptOrder,
        ahead: Ahead,
        tokenizer: Any,
        grader: Grader,
        journal: GroupJournal,
        newest_version: int,
    ) -> None:
        """Begins nothing before the first publish(). prompts: goes on behind what is ahead.

        newest_version: of the weights that this run has had. What the journal has of later ones is not used:
        a run that went on from a checkpoint comes to other weights of the same number.
        """
        prompts.load_state(ahead.prompts)
        self._config, self._prompts, self._tokenizer = config, prompts, tokenizer
        self._grader, self._carried_over = grader, list(ahead.groups)
        self._flow = ahead.flow
        self._journal = journal
        staleness = config.rollout.staleness
        self._complete = journal.read(
            prompts.problem,
            lambda group: group.begun >= ahead.first and _within(group, staleness, newest_version),
        )
        """By Group.key: of a process before this one, to be found again."""
        for group in ahead.groups:
            if group.complete and group.key not in self._complete:
                journal.add(group)  # the driver keeps no responses
        self._version = -1
        self._sampler: Sampler | None = None
        self._begun: dict[int, tuple[RolloutGroups, asyncio.Task[None]]] = {}
        """By iteration, not taken yet."""
        self._taken_next = self._next = ahead.first
        """Iterations whose rollouts are taken, and begun, next."""
        self._interrupted = False
        self._answered = asyncio.Event()
        """Set when the engines have answered a request of the rollout that was begun last."""
        self._answered.set()

    def publish(self, version: int, routing_width: int, endpoint: Endpoint) -> None:
        """The engines have these weights: begin what they allow. What was lost with engines, or with the
        weights of servers that came back without them, goes on.

        routing_width: see Sampler.of.
        """
        config = self._config
        self._version = version
        self._journal.forget_before(version)
        self._sampler = Sampler.of(
            config, endpoint, self._tokenizer, self._grader, routing_width,
            interrupted=lambda: self._interrupted,
        )  # fmt: skip
        for iteration, (rollout, drawing) in self._begun.items():
            if drawing.done() and isinstance(drawing.exception(), MENDED):
                self._draw(iteration, rollout)
        while self._next < min(version + config.rollout.staleness + 1, config.iterations):
            begun = [group for group in self._carried_over if group.begun <= self._next]
            self._carried_over = [group for group in self._carried_over if group.begun > self._next]
            rollout = train_rollout(config, self._prompts, self._next, begun, weight_version=version)
            self._draw(self._next, rollout)
            self._next += 1

    def _draw(self, iteration: int, rollout: RolloutGroups) -> None:
        self._restore(rollout)
        before, self._answered = self._answered, asyncio.Event()
        drawing = self._drawn_behind(before, rollout, self._answered)
        self._begun[iteration] = rollout, asyncio.create_task(drawing)

    async def _drawn_behind(
        self, before: asyncio.Event, rollout: RolloutGroups, answered: asyncio.Event
    ) -> None:
        """Engines take requests as they come, and the router may let some overtake others that are sent in
        the same moment: those of a rollout wait until an older one's have arrived."""
        await before.wait()

        def note(group: Group) -> None:
            answered.set()
            if group.complete:
                self._journal.add(group)

        try:
            await self._drawn(rollout, note)
        finally:
            answered.set()

    def _restore(self, rollout: RolloutGroups) -> None:
        """Give a rollout the groups that are complete already; one that is dropped has its place taken."""
        open_groups = [group for group in rollout.groups if not group.complete]
        for group in open_groups:  # grows
            known = self._complete.pop(group.key, None)
            if known is not None and _same(known, group):
                replacement = rollout.restore(group, known.members)
                open_groups += [replacement] if replacement else []

    async def _drawn(self, rollout: RolloutGroups, on_sample: OnSample = lambda _: None) -> None:
        assert self._sampler is not None, "weights are published"
        await self._sampler.draw(rollout, on_sample, lambda: self._version)

    async def take(self, iteration: int) -> RolloutGroups:
        """The rollout of an iteration, once it is complete, or as it is after interrupt().

        Raises what ended its drawing; after EnginesLost, publish() and take() go on with it.
        """
        rollout, drawing = self._begun[iteration]
        await asyncio.shield(drawing)
        del self._begun[iteration]
        self._flow += Flow.of(rollout, taken=True)
        self._taken_next = iteration + 1
        samples = [*rollout.samples(self._tokenizer), *rollout.dropped_samples(self._tokenizer)]
        self._prompts.record(success_rates(samples, Subproblem(self._config, iteration).is_correct))
        return rollout

    async def draw(self, rollout: RolloutGroups) -> RolloutGroups:
        """An evaluation or a check, under the weights that the engines have, beside what is under way."""
        await self._drawn(rollout)
        return rollout

    def interrupt(self) -> None:
        """End all drawing as it is."""
        self._interrupted = True

    def flow(self) -> Flow:
        """All responses and tokens since the run was started. RolloutError where some are lost."""
        flow = self._flow + Flow.carried(self._carried_over)
        for rollout, _ in self._begun.values():
            flow += Flow.of(rollout, taken=False)
        flow.check(answers_under_way=self._config.rollout.agent is not None)
        return flow

    def ahead(self, *, responses: bool) -> Ahead:
        """What is begun and not taken. responses: with what is sampled of it; else to be sampled again."""
        left = self._flow
        for rollout, _ in self._begun.values():
            left += Flow.dropped(rollout)
        groups = [group for rollout, _ in self._begun.values() for group in rollout.groups]
        groups += self._carried_over
        if not responses:
            groups = [_unsampled(group) for group in groups]
        return Ahead(self._taken_next, self._prompts.state(), groups, left)


def _within(group: Group, staleness: int, newest_version: int) -> bool:
    """Whether these weights, and none too old for the group's rollout, have sampled it."""
    versions = [version for member in group.members for part in member.parts for version in part.versions]
    return bool(versions) and min(versions) >= group.begun - staleness and max(versions) <= newest_version


def _same(one: Group, other: Group) -> bool:
    """Whether they are responses to one prompt, by the same draws."""
    seeds = [[member.seed for member in group.members] for group in (one, other)]
    return one.problem.key == other.problem.key and seeds[0] == seeds[1]


def _unsampled(group: Group) -> Group:
    members = [Trajectory(group.problem, member.number, member.seed) for member in group.members]
    return replace(group, members=members)
