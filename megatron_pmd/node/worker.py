"""One actor rank, as node/ranks.py starts it through torch's elastic agent: builds a run, trains it."""

from __future__ import annotations

import faulthandler
import gc
import importlib
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from setproctitle import getproctitle, setproctitle

from megatron_pmd.config import RunConfig, StopAfter, build
from megatron_pmd.engine.placement import sampled_by
from megatron_pmd.errors import PmdError
from megatron_pmd.heartbeat import Heartbeat
from megatron_pmd.lock import locked
from megatron_pmd.node.inputs import model_to_make
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
    from megatron_pmd.training.state import RunState
    from megatron_pmd.training.trainer import Trainer


PROCESS_TITLE = "megatron-pmd rank"
"""What `ps` calls a rank's process, before its number."""
getproctitle()  # finds the title's place, which it cannot once the environment is changed
TELL_WHERE = signal.SIGUSR2
"""A rank that gets it writes where each of its threads stands (JobSpec.stacks)."""
LETTING_THE_CAUSE_SPEAK_SECONDS = 2.0
"""A rank that failed of what no other rank need know ends this much later: it may have failed because a rank
of another node did, and the first node to say why is believed (node/main.py)."""
PREPARING_SECONDS = 600.0
"""For another run that makes the model's folder."""


@dataclass(frozen=True)
class JobSpec:
    """What a node's ranks are to do."""

    config: dict[str, Any]
    folder: str
    outcomes: str
    """Start of the names of the files in which failing ranks say why."""
    heartbeats: tuple[str, ...]
    """By local rank, its launcher's memory in which it says what it does."""
    stacks: tuple[str, ...]
    """And in which functions its threads are, when it is sent TELL_WHERE."""
    replay: str | None = None
    """Rollout file or folder to train on instead of engines."""
    stop_after: StopAfter | None = None

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
    from megatron_pmd.actor.environment import prepare_imports

    config = build(spec.config)
    if not cpu:
        # before megatron-core, which imports Transformer Engine, which reads it while it is imported
        prepare_imports(config)
    from megatron_pmd.actor import parallel
    from megatron_pmd.distributed import Control
    from megatron_pmd.node.bandwidth import check_bandwidth

    heartbeat = Heartbeat(Path(spec.heartbeats[int(os.environ["LOCAL_RANK"])]))
    heartbeat.enter("start", 0, patience_seconds=config.longest_silence_seconds)
    parallel.initialize(config.layout, seed=config.seed, timeout_seconds=config.actor.timeout_seconds)
    # the driver may take this long in a rollout, or a rank in an engine's start, while the others wait for it
    longest = max(config.longest_rollout_seconds, config.rollout.cold_start_timeout_seconds)
    waiting = longest + config.actor.timeout_seconds
    control = Control(waiting, heartbeat)
    check_bandwidth(control)
    # megatron-core collects garbage at each checkpoint, for each optimizer (distrib_optimizer.py). To look at
    # all that is imported takes 0.4 s each time, and a forked rank copies memory that it looks at.
    gc.freeze()
    _train(_Start(config, spec, control, shutdown, cpu))
    # Not after a failure: the other ranks would fail of it before run_rank has noted this one's, and the
    # launcher would call theirs the first.
    torch.distributed.destroy_process_group()


def prepare_model(config: RunConfig) -> None:
    """Make the model folder if it does not exist and the recipe knows how."""
    path, prepare = Path(config.model.path), model_to_make(config)
    if prepare is None:
        return
    import torch

    make = load(prepare, what="model.prepare")
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    partial = path.with_name(path.name + ".partial")
    with locked(
        path.with_name(f".{path.name}.lock"), f"{path} is being made",
        way_out="wait for it, or end it", patience_seconds=PREPARING_SECONDS,
    ):  # fmt: skip
        if not path.exists():  # another run of the same model may have made it meanwhile
            shutil.rmtree(partial, ignore_errors=True)
            # a recipe seeds torch for its weights: what this run draws next, as its adapters, must not depend
            # on whether the folder was there
            with torch.random.fork_rng(devices):
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

    @property
    def samples(self) -> bool:
        """Whether engines make its rollouts; else they are given, or there are none."""
        return sampled_by(self.config, replay=self.spec.replay is not None) is not None


def _train(start: _Start) -> None:
    """From the run's folder to its summary."""
    from megatron_pmd.actor.checkpoint_folders import newest_sound, read_run_state
    from megatron_pmd.training.loop import train

    control, remarks = start.control, list[str]()
    control.on_driver(lambda: prepare_model(start.config))
    newest = control.on_driver(lambda: newest_sound(start.folder / "checkpoints", remarks.append))
    resume_from: Path | None = control.from_driver(newest)
    saved = read_run_state(resume_from) if resume_from else {"iteration": 0}
    with ExitStack() as cleanup:
        # before the run's files: a start that fails here leaves a name that can be used again
        inputs = _read_inputs(start, saved, cleanup, remarks)
        log = _open_log(start, resume_from, saved["iteration"])
        try:
            for remark in remarks:
                log.say(remark)
            run = _assemble(start, log, inputs, resume_from, saved["iteration"], cleanup)
            outcome = train(run, start.spec.stop_after)
        except BaseException as failure:
            log.finish(RunOutcome.of(failure))
            raise
        log.finish(outcome)


@dataclass(frozen=True)
class _Inputs:
    """What the user gives a run, read and found to be in order."""

    tokenizer: Any
    problems: ProblemSets | None
    """None on every rank but the driver, as is the next."""
    rewards: Any
    """Who grades; None also where nothing is sampled."""


def _read_inputs(start: _Start, saved: dict[str, Any], cleanup: ExitStack, remarks: list[str]) -> _Inputs:
    """Collective. Raises what is wrong with the data, rollouts, tokenizer, lengths or reward, on every rank.

    remarks: for the console, once there is one.
    """
    from megatron_pmd.data.tokenizer import load_tokenizer
    from megatron_pmd.engine.lengths import check_lengths
    from megatron_pmd.observe.trackers import check_trackers
    from megatron_pmd.rewards.grading import grading
    from megatron_pmd.rollout.teacher import check_teacher
    from megatron_pmd.rollout_file import check_rollouts

    config, control = start.config, start.control
    control.on_driver(lambda: check_trackers(config.trackers))
    if start.spec.replay is not None:
        replay, to_train = Path(start.spec.replay), range(saved["iteration"], config.iterations)
        scored = config.algorithm.teacher is not None
        control.on_driver(lambda: check_rollouts(replay, to_train, scored=scored))
    elif start.samples:
        control.on_driver(lambda: check_lengths(config))
    tokenizer = load_tokenizer(config.model)
    if start.samples and (teacher := config.algorithm.teacher):
        control.on_driver(lambda: check_teacher(teacher, tokenizer))
    problems = control.on_driver(lambda: _problems(config, tokenizer, remarks.append, saved))
    rewards = None
    if start.samples and config.rollout.placement == "colocated":  # else the sampler's process has them
        rewards = control.on_driver(lambda: cleanup.enter_context(grading(config.reward, config.rewards)))
    return _Inputs(tokenizer, problems, rewards)


def _open_log(start: _Start, resume_from: Path | None, completed: int) -> RunLog:
    """The run's folder and console; what its phases took in earlier starts is known from here on."""
    from megatron_pmd.files import read_records
    from megatron_pmd.observe.console import Console
    from megatron_pmd.observe.journal import Journal
    from megatron_pmd.training.run_log import RunLog

    config, folder, console = start.config, start.folder, Console()
    journal = start.control.on_driver(
        lambda: Journal.open(folder, config, completed, keep_warm_start=bool(resume_from), say=console.say)
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
    start: _Start, log: RunLog, inputs: _Inputs, resume_from: Path | None, completed: int, cleanup: ExitStack
) -> Trainer:
    """The parts of a run on this rank, as new or as a checkpoint has them; cleanup ends what they start."""
    from megatron_pmd.actor.actor import Actor
    from megatron_pmd.actor.checkpoint_folders import setting_aside
    from megatron_pmd.device import SharedDevice, saying_who_fills_it
    from megatron_pmd.rollout.carried_over_file import read_carried_over
    from megatron_pmd.training.state import RunState
    from megatron_pmd.training.trainer import Trainer

    config, control, problems = start.config, start.control, inputs.problems
    state = RunState(completed=completed, resumed=resume_from is not None)
    if resume_from and problems:
        begun = read_carried_over(resume_from, problems.train.problem)
        if config.rollout.placement == "colocated":
            state.carried_over = begun
        else:
            state.ahead = begun
    device = SharedDevice()
    rollouts = _rollouts(start, log, inputs, device, state, cleanup)
    if not start.cpu:  # on a CPU engines free nothing, and their start goes on beside the actor's
        rollouts.make_room()
    with saying_who_fills_it("start"):
        actor = Actor(config, control, device)
    if resume_from:
        with setting_aside(resume_from):
            actor.load(resume_from)
    return Trainer(
        config, start.folder, control, actor, rollouts, log, problems, inputs.tokenizer, start.shutdown, state
    )


def _rollouts(
    start: _Start,
    log: RunLog,
    inputs: _Inputs,
    device: SharedDevice,
    state: RunState,
    cleanup: ExitStack,
) -> RolloutSource:
    """Where this run's rollouts come from."""
    from megatron_pmd.rollout.group_journal import GroupJournal
    from megatron_pmd.training.live_engines import LiveEngines
    from megatron_pmd.training.production import Ahead
    from megatron_pmd.training.rollouts import Demonstrations, ReplayedRollouts
    from megatron_pmd.training.separate_engines import SeparateEngines

    config, control, problems = start.config, start.control, inputs.problems
    ahead_goes_on = start.samples and config.rollout.placement == "separate"
    if control.is_driver and not (ahead_goes_on and state.resumed):
        GroupJournal.discard(start.folder)  # of weights that this start does not have
    if start.spec.replay:
        return ReplayedRollouts(Path(start.spec.replay), config, problems, control)
    if not start.samples:
        return Demonstrations(config, problems, inputs.tokenizer)
    parts = (config, control, start.folder, inputs.tokenizer, inputs.rewards, log.console)
    options: dict[str, Any] = {
        "cpu": start.cpu, "problems": problems, "interrupted": start.shutdown.must_cut
    }  # fmt: skip
    engines: LiveEngines
    if config.rollout.placement == "colocated":
        engines = LiveEngines(*parts, **options, device=device)
    else:
        ahead = Ahead(state.completed, problems.train.state(), state.ahead) if problems else None
        engines = SeparateEngines(*parts, **options, ahead=ahead)
    cleanup.callback(engines.close)
    return engines


def _problems(
    config: RunConfig, tokenizer: Any, say: Callable[[str], None], saved: dict[str, Any]
) -> ProblemSets:
    """The run's problems, where it stands in them."""
    from megatron_pmd.data.problem_sets import ProblemSets

    problems = ProblemSets.load(config, tokenizer, say)
    if "prompts" in saved:
        problems.load_state(saved)
    return problems


def run_rank(spec: JobSpec) -> None:
    """The function of each rank's process: main(), leaving a file that says how a failing rank ended."""
    faulthandler.enable()
    stacks = os.open(spec.stacks[int(os.environ["LOCAL_RANK"])], os.O_WRONLY | os.O_APPEND)
    faulthandler.register(TELL_WHERE, stacks)
    # Where torch would write what a rank raises: on a full disk a file that its agent fails to read, and the
    # run would end with the traceback of that.
    os.environ.pop("TORCHELASTIC_ERROR_FILE", None)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        # Not the agent's handlers, which a forked process has too: a rank ends at once, also while blocked
        # in a collective; engines notice (engine/supervisor.py), ranks.py tidies up.
        signal.signal(number, signal.SIG_DFL)
    die_with_parent(parent=os.getppid())
    setproctitle(f"{PROCESS_TITLE} {os.environ['RANK']}")
    allow_many_files()
    try:
        main(spec)
    except BaseException as failure:
        with suppress(OSError):  # no room even in memory: the launcher then tells the exit code
            RunOutcome.of(failure).write(spec.outcome_file(int(os.environ["LOCAL_RANK"])))
        if not isinstance(failure, PmdError):  # whose message the launcher shows: a traceback would hide it
            with suppress(OSError):  # of all ranks but the first it goes into a file
                traceback.print_exc()
            if os.environ["WORLD_SIZE"] != os.environ["LOCAL_WORLD_SIZE"]:
                time.sleep(LETTING_THE_CAUSE_SPEAK_SECONDS)
        sys.exit(1)


def import_what_ranks_need() -> None:
    """Import, in the process that ranks are forked from, what takes each of them 8 s of a core.

    On a CPU only: Transformer Engine reads the environment, and may start CUDA, while it is imported.
    """
    quiet()
    from megatron_pmd.actor.cpu import bridge_import, standins

    standins.install()
    bridge_import.import_bridge()
    for name in ("actor.actor", "training.trainer", "training.live_engines"):
        importlib.import_module(f"megatron_pmd.{name}")
