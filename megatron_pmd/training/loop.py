"""Policy mirror descent, one phase after another. What a phase does is in phases.py; here is their order."""

from __future__ import annotations

from megatron_pmd.config import StopAfter
from megatron_pmd.outcome import RunEnds, RunOutcome, Status
from megatron_pmd.training import exports, phases
from megatron_pmd.training.state import Iteration
from megatron_pmd.training.teaching import taught
from megatron_pmd.training.trainer import Trainer


def train(run: Trainer, stop_after: StopAfter | None = None) -> RunOutcome:
    """Train the iterations that are left; every rank runs this. Raises PmdError subclasses on failure."""
    try:
        phases.start(run)
        while run.state.completed < run.config.iterations:
            iterate(run, run.begin_iteration(), stop_after)
        phases.finish(run)
    except RunEnds as ends:
        return phases.end_early(run, ends.outcome)
    return RunOutcome(Status.COMPLETE)


def iterate(run: Trainer, iteration: Iteration, stop_after: StopAfter | None) -> None:
    """One rollout from π_t, then many optimizer steps towards the solution of its subproblem."""
    t = iteration.number
    if phases.evaluation_is_due(run, t):
        with run.phase("evaluate"):
            phases.evaluate(run, t)
    with run.phase("rollout"):
        batch = phases.collect(run, iteration)
    if stop_after == "rollout":
        raise RunEnds(RunOutcome(Status.STOPPED, f"after the rollout of iteration {t}, as asked"))
    with run.phase("release"):
        phases.release(run, iteration)
    with run.phase("anchor"):
        steps = phases.schedule(run, batch)
        anchor = phases.anchor(run, iteration, batch, steps)  # log π_t, fixed for the whole iteration
        batch = taught(run, iteration, batch, anchor)
    with run.phase("update"):
        for k, microbatches in enumerate(run.log.progress("update", steps)):
            phases.update(run, iteration, batch, microbatches, anchor, step=k)
    run.complete(iteration)  # from here on a checkpoint holds this iteration
    alarm = phases.conclude(run, iteration, batch)
    if alarm is not None or phases.checkpoint_is_due(run, t + 1):
        with run.phase("save"):
            phases.save(run)
    if exports.is_due(run, t + 1):
        with run.phase("export"):
            exports.write(run, t + 1)
    with run.phase("sync") as record:
        run.actor.release_optimizer()
        record.bytes = run.rollouts.load(run.actor, version=t + 1).bytes
    with run.phase("resume"):
        run.actor.release_parameters()
        run.rollouts.resume()
    run.log.show_iteration(t)
    if alarm is not None:
        raise RunEnds(alarm)
