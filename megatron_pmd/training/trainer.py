"""A run on one rank: its parts, and where it stands. loop.py says in which order they move, phases.py how."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_pmd.actor.actor import Actor
from megatron_pmd.actor.residency import actor_bytes
from megatron_pmd.config import RunConfig
from megatron_pmd.data.problem_sets import ProblemSets
from megatron_pmd.device import saying_who_fills_it
from megatron_pmd.distributed import Control
from megatron_pmd.observe.journal import Phase
from megatron_pmd.observe.subphases import together
from megatron_pmd.outcome import RunEnds, RunOutcome, Status
from megatron_pmd.rollout.groups import Group
from megatron_pmd.rollout_file import RolloutWriter
from megatron_pmd.training.checkpoints import Checkpoints
from megatron_pmd.training.rollouts import RolloutSource
from megatron_pmd.training.run_log import RunLog
from megatron_pmd.training.shutdown import CHECKED, Shutdown
from megatron_pmd.training.state import Iteration, RunState

COMPUTES = {"anchor", "update"}
"""Phases in which every micro-batch is a sign of life of its rank."""


@dataclass
class Trainer:
    """The parts that the loop moves. Every rank has one, and all of them make the same calls."""

    config: RunConfig
    folder: Path
    control: Control
    actor: Actor
    rollouts: RolloutSource
    log: RunLog
    problem_sets: ProblemSets | None
    """The driver's; None elsewhere."""
    tokenizer: Any
    shutdown: Shutdown
    state: RunState
    checkpoints: Checkpoints = field(init=False)
    rollout_writer: RolloutWriter = field(init=False, default_factory=RolloutWriter)
    begun: int = field(init=False, default=0)
    """Iterations that this start has begun."""

    def __post_init__(self) -> None:
        self.checkpoints = Checkpoints(self.folder, self.control, self.actor, self.shutdown)

    @property
    def problems(self) -> ProblemSets:
        assert self.problem_sets is not None, "only the driver draws problems"
        return self.problem_sets

    def begin_iteration(self) -> Iteration:
        """The next iteration to be trained."""
        self.begun += 1
        self.log.begin_iteration(self.state.completed)
        self.remember(self.state.carried_over)
        return Iteration(self.state.completed, left_over=self.state.carried_over)

    def remember(self, groups: list[Group]) -> None:
        """Note where a start from the next checkpoint goes on: with these, then problems not yet drawn."""
        self.state.prompts = self.problem_sets.state() if self.problem_sets else {}
        self.state.carried_over, self.state.ahead = groups, self.rollouts.ahead()

    def remember_ahead(self) -> None:
        """Note what is sampled ahead by now. What else an unfinished iteration has drawn, as demonstrations,
        stays as it was noted before: a start from here draws it again."""
        self.state.ahead = self.rollouts.ahead()
        if self.state.ahead:
            self.state.prompts = {**self.state.prompts, "prompts": self.problems.train.state()}

    def complete(self, iteration: Iteration) -> None:
        """All optimizer steps of an iteration are taken: the run stands behind it."""
        self.state.completed = iteration.number + 1
        self.remember(iteration.left_over)

    @contextmanager
    def phase(self, name: str) -> Iterator[Phase]:
        """Time a phase, note what is in memory at its end. Raises RunEnds if the run must end before it,
        DeviceFull if it takes more memory than the device has."""
        if name in CHECKED:
            self._end_if_it_must(name)
        config = self.config
        patience = config.actor.timeout_seconds if name in COMPUTES else config.longest_silence_seconds
        self.control.heartbeat.enter(name, self.state.completed, patience_seconds=patience)
        with self.log.phase(name) as record, saying_who_fills_it(name):
            yield record
            self.checkpoints.publish(wait=False)
            mine = (actor_bytes(), self.rollouts.engine_bytes(), self.rollouts.clock.take())
            ranks = self.control.gather(mine)
            if ranks:
                actor, engine, subphases = zip(*ranks, strict=True)
                record.actor_bytes, record.engine_bytes = sum(actor), sum(engine)
                record.subphases = together(list(subphases))
        self.shutdown.expect(name, record.seconds)

    def _end_if_it_must(self, name: str) -> None:
        """Raises RunEnds on all ranks when one of them was told to save, or the time is up."""
        for reason in self.control.all_gather(self.shutdown.reason_before(name)):
            if reason:
                raise RunEnds(RunOutcome(Status.SAVED, reason))
