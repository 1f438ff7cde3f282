"""Where rollouts come from: live engines, or files of an earlier run. The loop cannot tell which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from megatron_pmd.batch import Sample
from megatron_pmd.config import RunConfig
from megatron_pmd.data.demonstrations import demonstrations
from megatron_pmd.data.problem_sets import ProblemSets
from megatron_pmd.data.problems import Problem
from megatron_pmd.data.prompts import PromptOrder
from megatron_pmd.distributed import Control
from megatron_pmd.observe.subphases import SubphaseClock
from megatron_pmd.rollout.groups import DrawSettings, EndRules, Group, RolloutGroups
from megatron_pmd.rollout_file import read_rollout
from megatron_pmd.training.subproblem import Subproblem
from megatron_pmd.weight_sync.push import PushReport

if TYPE_CHECKING:  # the process that samples ahead has no use for Megatron
    from megatron_pmd.actor.actor import Actor


@dataclass(frozen=True)
class Drawn:
    """The rollout of an iteration, on the driver."""

    groups: RolloutGroups
    samples: list[Sample]
    """Of complete groups, graded."""
    values: dict[str, float] = field(default_factory=dict)
    """What its source has to log."""


class RolloutSource(Protocol):
    """What the loop asks for samples. Collective: every rank calls, the driver alone gets samples back."""

    live: bool
    """Whether there are engines: only they can be evaluated, and have weights to be checked."""
    clock: SubphaseClock
    """What the phases spend their time on."""

    def take(self, iteration: int, carried_over: Sequence[Group], actor: Actor) -> Drawn | None:
        """The rollout of an iteration; None on ranks other than the driver.

        Each sample says which of its tokens were sampled under which weight version (Sample.segments): a
        source may have begun them in earlier iterations, or produced them while others were trained on.
        carried_over: the driver's, to be continued. actor: whose weights an engine is given that has to be
        started again.
        """

    def ahead(self) -> list[Group]:
        """What is begun for later iterations and not taken, as known on the driver: see refresh()."""

    def refresh(self) -> None:
        """Have ahead(), and the driver's prompt order with it, tell of this moment; else of the last take."""

    def attend(self) -> None:
        """Between two steps of the actor: what samples meanwhile, and has ended, is started again.

        Not collective, and waits for nothing.
        """

    def draw(self, rollout: RolloutGroups | None, actor: Actor, title: str) -> list[Sample]:
        """Samples for the rollout, drawn now, under the actor's weights; only of live engines.

        Collective, as take(); the rollout is the driver's, and holds what was drawn.
        """

    def make_room(self) -> None:
        """Before there is an actor: engines have started, and have left the device to it."""

    def release(self) -> None:
        """Engines leave the device to the actors."""

    def load(self, actor: Actor, version: int) -> PushReport:
        """Engines take the actor's weights as this version."""

    def resume(self) -> None:
        """Engines accept requests again."""

    def engine_bytes(self) -> int:
        """Resident memory of this rank's engine."""

    def close(self) -> None:
        """End what this rank has started; not collective."""


class WithoutEngines:
    """What a source does in the phases of engines that it does not have."""

    live = False

    def __init__(self) -> None:
        self.clock = SubphaseClock()

    def make_room(self) -> None: ...

    def ahead(self) -> list[Group]:
        return []

    def refresh(self) -> None: ...

    def attend(self) -> None: ...

    def draw(self, rollout: RolloutGroups | None, actor: Actor, title: str) -> list[Sample]:
        raise AssertionError(f"{title}: only live engines are asked for more than rollouts")

    def release(self) -> None: ...

    def load(self, actor: Actor, version: int) -> PushReport:
        return PushReport()

    def resume(self) -> None: ...

    def engine_bytes(self) -> int:
        return 0

    def close(self) -> None: ...


class ReplayedRollouts(WithoutEngines):
    """Rollouts of an earlier run, from its file or its folder of files."""

    def __init__(self, path: Path, config: RunConfig, problems: ProblemSets | None, control: Control) -> None:
        """path: one rollout file, or a folder with one for every iteration that will be trained.

        That they are there, rollout_file.check_rollouts has found before. problems: the driver's.
        """
        super().__init__()
        self._path, self._config, self._problems, self._control = path, config, problems, control

    def take(self, iteration: int, carried_over: Sequence[Group], actor: Actor) -> Drawn | None:
        """The recorded samples; the prompt order goes on as in the run that they are of."""
        return self._control.on_driver(lambda: self._read(iteration, carried_over))

    def _read(self, iteration: int, carried_over: Sequence[Group]) -> Drawn:
        assert self._problems is not None, "the driver knows what to draw"
        groups = train_rollout(self._config, self._problems.train, iteration, carried_over)
        path = self._path / f"{iteration}.parquet" if self._path.is_dir() else self._path
        return Drawn(groups, read_rollout(path)[0])


class Demonstrations(WithoutEngines):
    """The problems' own answers: supervised training (algorithm.objective=sft)."""

    def __init__(self, config: RunConfig, problems: ProblemSets | None, tokenizer: Any) -> None:
        """problems: the driver's; None elsewhere."""
        super().__init__()
        self._config, self._problems, self._tokenizer = config, problems, tokenizer

    def take(self, iteration: int, carried_over: Sequence[Group], actor: Actor) -> Drawn | None:
        if self._problems is None:
            return None
        groups = train_rollout(self._config, self._problems.train, iteration, carried_over)
        return Drawn(groups, demonstrations([group.problem for group in groups.groups], self._tokenizer))


def train_rollout(
    config: RunConfig,
    prompts: PromptOrder,
    iteration: int,
    carried_over: Sequence[Group],
    *,
    weight_version: int | None = None,
) -> RolloutGroups:
    """The rollout of one iteration: what is carried over, then as many new prompts as it lacks.

    weight_version: of the weights it is begun with; None: those that the iteration trains on.
    """
    sampling, wanted = config.rollout, config.batch.prompts_per_rollout
    extra = sampling.partial.extra_groups if sampling.partial else 0
    return RolloutGroups(
        prompts.take(max(0, wanted + extra - len(carried_over))),
        _as_in_training(
            config,
            iteration,
            samples_per_prompt=config.batch.samples_per_prompt,
            weight_version=weight_version,
            scored=True,
        ),
        EndRules(
            wanted=wanted,
            groups_per_step=config.batch.prompts_per_step,
            partial=sampling.partial,
            group_filter=sampling.group_filter,
            shaping=Subproblem(config, iteration).shaped_group,
        ),
        next_problem=lambda: prompts.take(1)[0],
        carried_over=carried_over,
    )


def check_rollout(config: RunConfig, problems: list[Problem], iteration: int) -> RolloutGroups:
    """One response to each problem, as in training."""
    settings = _as_in_training(config, iteration, samples_per_prompt=1, stream="check")
    return RolloutGroups(problems, settings)


def _as_in_training(
    config: RunConfig,
    iteration: int,
    *,
    samples_per_prompt: int,
    stream: str = "train",
    weight_version: int | None = None,
    scored: bool = False,
) -> DrawSettings:
    return DrawSettings(
        samples_per_prompt=samples_per_prompt,
        iteration=iteration,
        weight_version=iteration if weight_version is None else weight_version,
        temperature=Subproblem(config, iteration).temperature,
        top_p=config.rollout.top_p,
        run_seed=config.seed,
        stream=stream,
        scored=scored,
    )


def evaluation_rollout(config: RunConfig, problems: list[Problem], iteration: int) -> RolloutGroups:
    """Held-out problems under the evaluation's own sampling settings."""
    settings = DrawSettings(
        samples_per_prompt=config.evaluation.samples_per_prompt,
        iteration=iteration,
        weight_version=iteration,
        temperature=config.evaluation.temperature,
        top_p=config.evaluation.top_p,
        run_seed=config.seed,
        stream="evaluation",
    )
    return RolloutGroups(problems, settings)
