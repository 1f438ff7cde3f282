"""Where rollouts come from: live engines, or files of an earlier run. The loop cannot tell which."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from megatron_pmd.actor.actor import Actor
from megatron_pmd.batch import Sample
from megatron_pmd.config import RunConfig
from megatron_pmd.data.demonstrations import demonstrations
from megatron_pmd.data.problems import Problem
from megatron_pmd.data.prompts import PromptOrder
from megatron_pmd.distributed import Control
from megatron_pmd.observe.subphases import SubphaseClock
from megatron_pmd.rollout.groups import DrawSettings, EndRules, Group, RolloutGroups
from megatron_pmd.rollout_file import read_rollout
from megatron_pmd.training.subproblem import Subproblem
from megatron_pmd.weight_sync.push import PushReport


class RolloutSource(Protocol):
    """What the loop asks for samples. Collective: every rank calls, the driver alone gets samples back."""

    live: bool
    """Whether there are engines: only they can be evaluated, and have weights to be checked."""
    clock: SubphaseClock
    """What the phases spend their time on."""

    def take(self, rollout: RolloutGroups | None, actor: Actor) -> list[Sample]:
        """The rollout that the groups are for: complete groups, graded.

        [] on ranks other than the driver, whose rollout is None.

        Each sample says which of its tokens were sampled under which weight version (Sample.segments): a
        source may have begun them in earlier iterations, or produced them while others were trained on.
        actor: whose weights an engine is given that has to be started again.
        """

    def draw(self, rollout: RolloutGroups | None, actor: Actor, title: str) -> list[Sample]:
        """Samples for the rollout, drawn now, under the actor's weights; only of live engines. As take()."""

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

    def __init__(self, path: Path, control: Control) -> None:
        """path: one rollout file, or a folder with one for every iteration that will be trained.

        That they are there, rollout_file.check_rollouts has found before.
        """
        super().__init__()
        self._path, self._control = path, control

    def take(self, rollout: RolloutGroups | None, actor: Actor) -> list[Sample]:
        """The recorded samples of the rollout's iteration."""
        return self._control.on_driver(lambda: self._read(rollout)) or []

    def _read(self, rollout: RolloutGroups | None) -> list[Sample]:
        assert rollout is not None, "the driver knows what to draw"
        wanted = rollout.settings.iteration
        return read_rollout(self._path / f"{wanted}.parquet" if self._path.is_dir() else self._path)[0]


class Demonstrations(WithoutEngines):
    """The problems' own answers: supervised training (algorithm.objective=sft)."""

    def __init__(self, control: Control, tokenizer: Any) -> None:
        super().__init__()
        self._control, self._tokenizer = control, tokenizer

    def take(self, rollout: RolloutGroups | None, actor: Actor) -> list[Sample]:
        if rollout is None:
            return []
        return demonstrations([group.problem for group in rollout.groups], self._tokenizer)


def train_rollout(
    config: RunConfig, prompts: PromptOrder, iteration: int, carried_over: list[Group]
) -> RolloutGroups:
    """The rollout of one iteration: what the last one left over, then as many new prompts as it lacks."""
    sampling, wanted = config.rollout, config.batch.prompts_per_rollout
    extra = sampling.partial.extra_groups if sampling.partial else 0
    return RolloutGroups(
        prompts.take(max(0, wanted + extra - len(carried_over))),
        _as_in_training(config, iteration, samples_per_prompt=config.batch.samples_per_prompt),
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
    config: RunConfig, iteration: int, *, samples_per_prompt: int, stream: str = "train"
) -> DrawSettings:
    return DrawSettings(
        samples_per_prompt=samples_per_prompt,
        iteration=iteration,
        weight_version=iteration,
        temperature=Subproblem(config, iteration).temperature,
        top_p=config.rollout.top_p,
        run_seed=config.seed,
        stream=stream,
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
