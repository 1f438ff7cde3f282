"""One actor rank, `python -m megatron_pmd.node.worker SPEC.json` under torchrun: builds a run, trains it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_pmd.config import RunConfig, StopAfter, build
from megatron_pmd.errors import ModelError, PmdError
from megatron_pmd.node.preflight import refuse_gpu_node
from megatron_pmd.outcome import RunOutcome
from megatron_pmd.plugins import load
from megatron_pmd.processes import allow_many_files, die_with_parent, quiet
from megatron_pmd.training.shutdown import Shutdown

if TYPE_CHECKING:  # torch and Megatron are imported once the environment is as they want it
    from megatron_pmd.data.problem_sets import ProblemSets
    from megatron_pmd.device import SharedDevice
    from megatron_pmd.distributed import Control
    from megatron_pmd.training.rollouts import RolloutSource
    from megatron_pmd.training.run_log import RunLog
    from megatron_pmd.training.trainer import Trainer


@dataclass(frozen=True)
class JobSpec:
    """What a node's ranks are to do."""

    config: dict[str, Any]
    folder: str
    outcomes: str
    """Start of the names of the files in which failing ranks say why."""
    replay: str | None = None
    """Rollout file or folder to train on instead of engines."""
    stop_after: StopAfter | None = None

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> JobSpec:
        return cls(**json.loads(path.read_text()))

    def outcome_file(self, local_rank: int) -> Path:
        """Where a rank of this node says why it failed."""
        return Path(f"{self.outcomes}-{local_rank}.json")


def main(spec: JobSpec) -> None:
    """Build this rank's part of the run and train; raises PmdError for what the user should read."""
    shutdown = Shutdown.of_this_job()
    shutdown.install()
    quiet()
    import torch

    cpu = not torch.cuda.is_available()
    if cpu:
        refuse_gpu_node()
        from megatron_pmd.actor.cpu import standins

        standins.install()
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    from megatron_pmd.actor import settings

    config = build(spec.config)
    if not cpu:
        # before megatron-core, which imports Transformer Engine, which reads it while it is imported
        settings.set_environment(config)
    from megatron_pmd.actor import parallel
    from megatron_pmd.distributed import Control
    from megatron_pmd.node.bandwidth import check_bandwidth

    parallel.initialize(config.layout, seed=config.seed, timeout_seconds=config.actor.timeout_seconds)
    # the driver may take this long in a rollout, or a rank in an engine's start, while the others wait for it
    longest = max(config.longest_rollout_seconds, config.rollout.cold_start_timeout_seconds)
    waiting = longest + config.actor.timeout_seconds
    control = Control(waiting)
    try:
        check_bandwidth(control)
        _train(_Start(config, spec, control, shutdown, cpu))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def prepare_model(config: RunConfig) -> None:
    """Make the model folder if it does not exist and the recipe knows how."""
    path = Path(config.model.path)
    if path.exists():
        return
    if config.model.prepare is None:
        raise ModelError(f"{path}: no such model folder; give model.path, or model.prepare to make one")
    make = load(config.model.prepare, what="model.prepare")
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    make(partial)
    partial.rename(path)


@dataclass(frozen=True)
class _Start:
    """What this start of a run goes by, on this rank."""

    config: RunConfig
    spec: JobSpec
    control: Control
    shutdown: Shutdown
    cpu: bool

    @property
    def folder(self) -> Path:
        return Path(self.spec.folder)


def _train(start: _Start) -> None:
    """From the run's folder to its summary."""
    from megatron_pmd.actor import checkpoint
    from megatron_pmd.training.loop import train

    control = start.control
    control.on_driver(lambda: prepare_model(start.config))
    resume_from = control.from_driver(checkpoint.latest(start.folder / "checkpoints"))
    saved = checkpoint.read_run_state(resume_from) if resume_from else {"iteration": 0}
    log = _open_log(start, resume_from, saved["iteration"])
    with ExitStack() as cleanup:
        try:
            run = _assemble(start, log, resume_from, saved, cleanup)
            outcome = train(run, start.spec.stop_after)
        except BaseException as failure:
            log.finish(RunOutcome.of(failure))
            raise
        log.finish(outcome)


def _open_log(start: _Start, resume_from: Path | None, completed: int) -> RunLog:
    """The run's folder and console; what its phases took in earlier starts is known from here on."""
    from megatron_pmd.files import read_records
    from megatron_pmd.observe.console import Console
    from megatron_pmd.observe.journal import Journal
    from megatron_pmd.training.run_log import RunLog

    config, folder, console = start.config, start.folder, Console()
    journal = start.control.on_driver(
        lambda: Journal.open(folder, config, completed, keep_warm_start=bool(resume_from))
    )
    if journal is not None:
        for line in read_records(folder / "ledger.jsonl"):
            start.shutdown.expect(line["phase"], line["seconds"] or 0.0)
        console.opening(config)
        for warning in config.warnings():
            console.say(f"warning: {warning}")
        if resume_from:
            console.say(f"resuming after {completed} iterations, from {resume_from}")
    return RunLog(console, journal)


def _assemble(
    start: _Start, log: RunLog, resume_from: Path | None, saved: dict[str, Any], cleanup: ExitStack
) -> Trainer:
    """The parts of a run on this rank, as new or as a checkpoint has them; cleanup ends what they start."""
    from megatron_pmd.actor.actor import Actor
    from megatron_pmd.data.tokenizer import load_tokenizer
    from megatron_pmd.device import SharedDevice
    from megatron_pmd.rollout.carried_over_file import read_carried_over
    from megatron_pmd.training.state import RunState
    from megatron_pmd.training.trainer import Trainer

    config, control = start.config, start.control
    tokenizer = load_tokenizer(config.model)
    problems = control.on_driver(lambda: _problems(config, tokenizer, log, saved))
    state = RunState(completed=saved["iteration"], resumed=resume_from is not None)
    if resume_from and problems:
        state.carried_over = read_carried_over(resume_from, problems.train.problem)
    device = SharedDevice()
    rollouts = _rollouts(start, state.completed, log, tokenizer, device, cleanup)
    if not start.cpu:  # on a CPU engines free nothing, and their start goes on beside the actor's
        rollouts.make_room()
    actor = Actor(config, control, device)
    if resume_from:
        actor.load(resume_from)
    return Trainer(
        config, start.folder, control, actor, rollouts, log, problems, tokenizer, start.shutdown, state
    )


def _rollouts(
    start: _Start, completed: int, log: RunLog, tokenizer: Any, device: SharedDevice, cleanup: ExitStack
) -> RolloutSource:
    """Where this run's rollouts come from."""
    from megatron_pmd.engine.lengths import check_lengths
    from megatron_pmd.rewards.remote import grading
    from megatron_pmd.training.live_engines import LiveEngines
    from megatron_pmd.training.rollouts import Demonstrations, ReplayedRollouts

    config, control = start.config, start.control
    if start.spec.replay:
        return ReplayedRollouts(Path(start.spec.replay), range(completed, config.iterations), control)
    if config.algorithm.objective.supervised:
        return Demonstrations(control, tokenizer)
    control.on_driver(lambda: check_lengths(config))
    rewards: Any = control.on_driver(lambda: cleanup.enter_context(grading(config.reward)))
    engines = LiveEngines(
        config, control, start.folder, tokenizer, rewards, log.console,
        cpu=start.cpu, interrupted=start.shutdown.must_cut, device=device,
    )  # fmt: skip
    cleanup.callback(engines.close)
    return engines


def _problems(config: RunConfig, tokenizer: Any, log: RunLog, saved: dict[str, Any]) -> ProblemSets:
    """The run's problems, where it stands in them."""
    from megatron_pmd.data.problem_sets import ProblemSets

    problems = ProblemSets.load(config, tokenizer, log.say)
    if "prompts" in saved:
        problems.load_state(saved)
    return problems


def _noting_failures(spec: JobSpec) -> None:
    """main(), which leaves a file that says how a failing rank ended."""
    try:
        main(spec)
    except BaseException as failure:
        RunOutcome.of(failure).write(spec.outcome_file(int(os.environ["LOCAL_RANK"])))
        raise


if __name__ == "__main__":
    from torch.distributed.elastic.multiprocessing.errors import record

    # at once, also while blocked in a collective; engines notice (engine/supervisor.py), ranks.py tidies up
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    die_with_parent(parent=os.getppid())
    allow_many_files()
    try:
        record(_noting_failures)(JobSpec.read(Path(sys.argv[1])))
    except PmdError:
        sys.exit(1)  # the launcher shows its message; a traceback would hide it
