"""Many short runs of a recipe's task in one process, with one engine and one start for all.

A process takes one core most of the time: two, with runs of their own in folders of their own, keep two busy.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_pmd.actor.cpu import standins
from megatron_pmd.config import RunConfig, override
from megatron_pmd.files import read_object
from megatron_pmd.observe.folder import RunFolder
from megatron_pmd.rollout.groups import Group
from megatron_pmd.training.rollouts import Drawn, train_rollout
from recipes import recipe

if TYPE_CHECKING:
    from megatron_pmd.actor.actor import Actor
    from megatron_pmd.data.problem_sets import ProblemSets
    from megatron_pmd.distributed import Control
    from megatron_pmd.observe.console import Console
    from megatron_pmd.training.live_engines import LiveEngines
    from megatron_pmd.training.run_log import RunLog
    from megatron_pmd.training.trainer import Trainer

COMMON = [
    "layout.data=1", "layout.expert=1", "rollout.ranks_per_engine=1", "checkpoint.every=null",
    "checkpoint.hf_export=false", "checkpoint.asynchronous=false",
]  # fmt: skip
"""Of all runs: one rank, and nothing on the disk that a study does not read."""


TINY = "tiny_moe_cpu"
"""The recipe whose task most studies have."""


def study_run(name: str, settings: Sequence[str], task: str = TINY) -> RunConfig:
    """A run of a recipe's task, which begins at the study's own start instead of with a supervised part."""
    config = override(recipe(task), [*COMMON, f"name={name}", *settings])
    return config.model_copy(update={"warm_start": None})


class RolloutsOfOneRun:
    """A RolloutSource over engines that outlive the run; its rollouts may be some iterations old.

    What an overlapped run has at most, this one has always: the rollout of iteration k is drawn under the
    weights of iteration k − lag, or the first ones.
    """

    def __init__(self, engines: LiveEngines, config: RunConfig, problems: ProblemSets, lag: int = 0) -> None:
        self._engines, self._config, self._problems, self._lag = engines, config, problems, lag
        self._drawn: deque[Drawn] = deque()
        self._next = 0

    def take(self, iteration: int, carried_over: Sequence[Group], actor: Actor) -> Drawn:
        """See RolloutSource. Draws what the weights of this iteration are the first to allow."""
        while self._next <= min(iteration + self._lag, self._config.iterations - 1):
            rollout = train_rollout(
                self._config, self._problems.train, self._next, carried_over, weight_version=iteration
            )
            self._drawn.append(Drawn(rollout, self._engines.draw(rollout, actor, "rollout")))
            self._next += 1
        return self._drawn.popleft()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engines, name)


@dataclass
class Laboratory:
    """What the runs of a study share."""

    folder: Path
    control: Control
    actor: Actor
    engines: LiveEngines
    console: Console
    tokenizer: Any

    @property
    def _start(self) -> Path:
        return self.folder / "warm_start" / "iteration-0"

    def teach(self, base: RunConfig) -> None:
        """The supervised start, unless the folder has it."""
        from megatron_pmd.training.run_log import RunLog
        from megatron_pmd.training.warm_start import warm_start

        if not self._start.exists():
            warm_start(self._trainer(base, self.folder, RunLog(self.console, None)))
            self.actor.save(self._start.parent, 0, {"iteration": 0})

    def write_start(self, folder: Path) -> None:
        """The start as a model folder, from which another laboratory can begin."""
        from megatron_pmd.convert.live import write_policy

        self.actor.load(self._start)
        model = Path(self.actor.config.model.path)
        write_policy(self.actor.export(), self.actor.shapes.keys(), model, folder, self.control)

    def train(self, config: RunConfig, lag: int = 0) -> dict[str, Any]:
        """One run, unless it is complete; its summary."""
        from megatron_pmd.observe.journal import Journal
        from megatron_pmd.training.loop import train
        from megatron_pmd.training.run_log import RunLog

        folder = self.folder / config.name
        summary = complete_summary(folder)
        if summary is not None:
            return summary
        for file in ("metrics.jsonl", "ledger.jsonl", "config.json"):
            (folder / file).unlink(missing_ok=True)
        self.actor.load(self._start)
        journal = Journal.open(folder, config, 0)
        run = self._trainer(config, folder, RunLog(self.console, journal), lag)
        return journal.finish(train(run))

    def _trainer(self, config: RunConfig, folder: Path, log: RunLog, lag: int = 0) -> Trainer:
        """A run that has not begun."""
        from megatron_pmd.data.problem_sets import ProblemSets
        from megatron_pmd.training.shutdown import Shutdown
        from megatron_pmd.training.state import RunState
        from megatron_pmd.training.trainer import Trainer

        problems = ProblemSets.load(config, self.tokenizer, log.say)
        rollouts: Any = RolloutsOfOneRun(self.engines, config, problems, lag)
        return Trainer(
            config, folder, self.control, self.actor, rollouts, log, problems, self.tokenizer,
            Shutdown(), RunState(),
        )  # fmt: skip


def complete_summary(folder: Path) -> dict[str, Any] | None:
    """summary.json of a run that is complete."""
    summary = read_object(folder / "summary.json")
    return summary if summary and summary["status"] == "complete" else None


def evaluations(run: Path) -> list[float]:
    """Share of the held-out problems' samples that are right, at each evaluation of a run."""
    return [line["mean_at_k"] for line in RunFolder.read(run).evaluations]


@contextmanager
def laboratory(folder: Path, settings: Sequence[str], task: str = TINY) -> Iterator[Laboratory]:
    """This process as the only actor rank, with an engine, and a model that has had its supervised start.

    settings: of rollouts and batches, as all runs have them. task: the recipe.
    """
    folder.mkdir(parents=True, exist_ok=True)
    base = override(recipe(task), [*COMMON, "name=warm_start", *settings])
    with ExitStack() as stack:
        control = stack.enter_context(_single_rank(base))
        from megatron_pmd.actor.actor import Actor
        from megatron_pmd.data.tokenizer import load_tokenizer
        from megatron_pmd.node.worker import prepare_model
        from megatron_pmd.observe.console import Console
        from megatron_pmd.rewards.pool import RewardPool
        from megatron_pmd.training.live_engines import LiveEngines

        prepare_model(base)
        console = Console(stack.enter_context((folder / "console.log").open("a")))
        tokenizer = load_tokenizer(base.model)
        rewards = stack.enter_context(RewardPool(base.reward))
        engines = LiveEngines(base, control, folder, tokenizer, rewards, console, cpu=True)
        stack.callback(engines.close)
        found = Laboratory(folder, control, Actor(base, control), engines, console, tokenizer)
        found.teach(base)
        yield found


@contextmanager
def _single_rank(config: RunConfig) -> Iterator[Control]:
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ.setdefault("MASTER_PORT", "0")
    standins.install()
    import torch

    from megatron_pmd.actor import parallel
    from megatron_pmd.distributed import Control

    torch.set_num_threads(1)
    parallel.initialize(config.layout, seed=0, timeout_seconds=600)
    try:
        yield Control(600)
    finally:
        torch.distributed.destroy_process_group()
