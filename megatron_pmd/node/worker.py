"""One actor rank, `python -m megatron_pmd.node.worker SPEC.json` under torchrun: builds a run, trains it."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_pmd.config import RunConfig, StopAfter, build
from megatron_pmd.errors import AlarmStop, ModelError, PmdError
from megatron_pmd.processes import allow_many_files, die_with_parent, quiet
from megatron_pmd.training.shutdown import Ending, HaltRequested


@dataclass(frozen=True)
class Order:
    """What the command line asks of every rank."""

    config: dict[str, Any]
    folder: str
    replay: str | None = None
    """Rollout file or folder to train on instead of engines."""
    stop_after: StopAfter | None = None

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Order:
        return cls(**json.loads(path.read_text()))


def main(order: Order) -> None:
    """Build this rank's part of the run and train; raises PmdError for what the user should read."""
    ending = Ending.of_this_job()
    ending.install()
    quiet()
    import torch

    cpu = not torch.cuda.is_available()
    if cpu:
        from megatron_pmd.actor.cpu import standins

        standins.install()
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    from megatron_pmd.actor import settings

    config = build(order.config)
    if not cpu:
        # before megatron-core, which imports Transformer Engine, which reads it while it is imported
        settings.set_environment(config)
    from megatron_pmd.actor import parallel
    from megatron_pmd.distributed import Control
    from megatron_pmd.node.bandwidth import check_bandwidth

    parallel.initialize(config.layout, seed=config.seed, timeout_seconds=config.actor.timeout_seconds)
    # the driver may take this long in a rollout while the others wait for it
    waiting = config.longest_rollout_seconds + config.actor.timeout_seconds
    control = Control(waiting)
    try:
        check_bandwidth(control)
        _train(config, order, control, ending, cpu=cpu)
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
    module, _, function = config.model.prepare.partition(":")
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    getattr(importlib.import_module(module), function)(partial)
    partial.rename(path)


def _train(config: RunConfig, order: Order, control: Any, ending: Ending, *, cpu: bool) -> None:
    from transformers import AutoTokenizer

    from megatron_pmd.actor import checkpoint
    from megatron_pmd.actor.actor import Actor
    from megatron_pmd.device import SharedDevice
    from megatron_pmd.files import read_records
    from megatron_pmd.observe.console import Console
    from megatron_pmd.observe.journal import Journal
    from megatron_pmd.rewards.remote import grading
    from megatron_pmd.rollout.carried_over import read_kept
    from megatron_pmd.training.loop import train
    from megatron_pmd.training.rollouts import Demonstrations, LiveEngines, ReplayedRollouts, RolloutSource
    from megatron_pmd.training.trainer import Run, StopRequested

    folder, console = Path(order.folder), Console()
    control.on_driver(lambda: prepare_model(config))
    resume_from = control.from_driver(checkpoint.latest(folder / "checkpoints"))
    state: dict[str, Any] = {"iteration": 0}
    if resume_from:
        state = checkpoint.read_run_state(resume_from)
    journal = control.on_driver(
        lambda: Journal.open(folder, config, state["iteration"], keep_warm_start=bool(resume_from))
    )
    if control.is_driver:
        for line in read_records(folder / "ledger.jsonl"):
            ending.expect(line["phase"], line["seconds"] or 0.0)
        console.opening(config)
        if resume_from:
            console.say(f"resuming after {state['iteration']} iterations, from {resume_from}")
    status, error = "failed", None
    with ExitStack() as cleanup:
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                config.model.path, trust_remote_code=config.model.trust_remote_code
            )
            problems = control.on_driver(lambda: _problems(config, tokenizer, console, state))
            kept = read_kept(resume_from, problems.train.problem) if resume_from and problems else []
            rollouts: RolloutSource
            device = SharedDevice()
            if order.replay:
                rollouts = ReplayedRollouts(Path(order.replay), control)
            elif config.algorithm.objective == "sft":
                rollouts = Demonstrations(control, tokenizer)
            else:
                rewards = control.on_driver(lambda: cleanup.enter_context(grading(config.reward)))
                rollouts = LiveEngines(
                    config, control, folder, tokenizer, rewards, console,
                    cpu=cpu, interrupted=ending.must_cut, device=device,
                )  # fmt: skip
                cleanup.callback(rollouts.close)
            if not cpu:  # on a CPU engines free nothing, and their start goes on beside the actor's
                rollouts.make_room()
            actor = Actor(config, control, device)
            if resume_from:
                actor.load(resume_from)
            run = Run(
                config, folder, control, actor, rollouts, console,
                journal=journal, problems=problems, tokenizer=tokenizer, kept=kept,
                first_iteration=state["iteration"], stop_after=order.stop_after,
                ending=ending, resumed=bool(resume_from),
            )  # fmt: skip
            try:
                train(run)
                status = "complete"
            except HaltRequested as halt:
                where = run.halt()
                if control.is_driver:
                    console.say(f"the run {halt}: {where}; the same command resumes it")
                status = "saved"
        except StopRequested:
            status = "stopped"
        except AlarmStop as alarm:
            status, error = "stopped", str(alarm)
            raise
        except BaseException as failure:
            error = f"{type(failure).__name__}: {failure}"
            raise
        finally:
            if journal is not None:
                journal.finish(status, error)


def _problems(config: RunConfig, tokenizer: Any, console: Any, state: dict[str, Any]) -> Any:
    """The run's problems, where it stands in them."""
    from megatron_pmd.data.problem_sets import ProblemSets

    problems = ProblemSets.load(config, tokenizer, console.say)
    if "prompts" in state:
        problems.load_state(state)
    return problems


if __name__ == "__main__":
    from torch.distributed.elastic.multiprocessing.errors import record

    # at once, also while blocked in a collective; engines notice (rollout/warden.py), the launcher tidies up
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    die_with_parent(parent=os.getppid())
    allow_many_files()
    try:
        record(main)(Order.read(Path(sys.argv[1])))
    except PmdError:
        sys.exit(1)  # the launcher shows its message; a traceback would hide it
