"""Policy mirror descent, one phase after another. What a phase does is in run.py; here is their order."""

from __future__ import annotations

from megatron_pmd.training.trainer import Run


def train(run: Run) -> None:
    """One rollout from π_t, then many optimizer steps towards the solution of its subproblem; and again.

    Every rank runs this. Raises PmdError subclasses on failure; StopRequested after the phase the user named.
    """
    run.start()
    for t in run.iterations():
        if run.evaluation_is_due(t):
            with run.phase("evaluate"):
                run.evaluate(t)
        with run.phase("rollout"):
            batch = run.collect(t)
        with run.phase("release"):
            run.rollouts.release()
            run.actor.wake()
        with run.phase("anchor"):
            steps = run.schedule(batch)
            anchor = run.anchor(batch, steps)  # log π_t, fixed for the whole iteration
        with run.phase("update"):
            for k, microbatches in enumerate(run.progress(steps)):
                run.update(batch, microbatches, anchor, iteration=t, step=k)
        run.check_alarms(t)
        if run.checkpoint_is_due(t + 1):
            with run.phase("save"):
                run.save(t + 1)
        if run.export_is_due(t + 1):
            with run.phase("export"):
                run.export(t + 1)
        with run.phase("sync") as record:
            run.actor.release_optimizer()
            record.bytes = run.rollouts.load(run.actor, version=t + 1).bytes
        with run.phase("resume"):
            run.actor.release_parameters()
            run.rollouts.resume()
        run.end_iteration(t, batch)
    run.finish()
