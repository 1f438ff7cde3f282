"""What each phase of the loop does. Collective: every rank calls every function, in the same order."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from megatron_pmd.actor import batching
from megatron_pmd.actor.actor import AnchorReport, Examples
from megatron_pmd.actor.noise_floor import FloorReport, rounded_anew
from megatron_pmd.actor.optimizer import learning_rate
from megatron_pmd.algorithm.alarms import raised
from megatron_pmd.algorithm.diagnostics import over_iteration
from megatron_pmd.batch import RolloutBatch, Sample
from megatron_pmd.data.demonstrations import demonstrations
from megatron_pmd.device import describe_left_overs, device_memory
from megatron_pmd.errors import StaleWeights
from megatron_pmd.evaluation.estimates import evaluate as estimate
from megatron_pmd.outcome import RunEnds, RunOutcome, Status
from megatron_pmd.rollout.groups import RolloutGroups
from megatron_pmd.rollout.metrics import account_values, rollout_values, staleness_values, success_rates
from megatron_pmd.rollout_file import write_rollout
from megatron_pmd.training import exports
from megatron_pmd.training.batch_shares import distribute
from megatron_pmd.training.metrics import (
    anchor_values,
    floor_values,
    source_values,
    step_values,
    throughput,
)
from megatron_pmd.training.rollouts import check_rollout, evaluation_rollout
from megatron_pmd.training.state import Iteration
from megatron_pmd.training.subproblem import Subproblem
from megatron_pmd.training.trainer import Trainer
from megatron_pmd.training.warm_start import warm_start


def start(run: Trainer) -> None:
    """A warm start if the recipe asks for one, or an export that the last start did not come to; then the
    engines take the actor's weights.
    """
    if run.config.warm_start and not run.state.resumed:
        with run.phase("warm_start"):
            warm_start(run)
    if exports.is_missing(run):
        with run.phase("export"):
            exports.write(run, run.state.completed)
    with run.phase("start"):
        run.actor.release_optimizer()
        run.rollouts.load(run.actor, version=run.state.completed)
        run.actor.release_parameters()
        run.rollouts.resume()


def collect(run: Trainer, iteration: Iteration) -> RolloutBatch:
    """Take and grade the rollout of an iteration. Raises RunEnds if the run has to end before it is drawn."""
    drawn = run.rollouts.take(iteration.number, run.state.carried_over, run.actor)
    rollout, samples = (drawn.groups, drawn.samples) if drawn else (None, [])
    if rollout is not None and run.rollouts.live:
        run.remember(rollout.groups)
        iteration.left_over = rollout.left_over
        if run.config.rollout.placement == "colocated":  # else they were sampled in other phases, too
            iteration.sampled_tokens = rollout.accounts.sampled_tokens
        iteration.values |= account_values(rollout) | (drawn.values if drawn else {})
    _end_if_cut(run, rollout, "rollout")
    described = None
    if rollout is not None:
        described, samples = _grade_and_describe(run, iteration, rollout, samples)
    batch = distribute(
        described, samples, lambda batch: _trained_here(run, batch), run.control, say=run.log.say
    )
    if run.config.actor.experts.replay_routing:
        batch.check_routing(run.actor.routing_width)
    return batch


def _grade_and_describe(
    run: Trainer, iteration: Iteration, rollout: RolloutGroups, samples: list[Sample]
) -> tuple[RolloutBatch, list[Sample]]:
    """On the driver: rewards become advantages, and the samples a file, numbers to log, and a batch.

    The file is written beside what follows, until the end of anchor(). The batch has no tokens yet; they are
    of the samples returned with it.
    """
    t = iteration.number
    subproblem = Subproblem(run.config, t)
    subproblem.compute_advantages(samples)
    run.rollout_writer.begin(run.folder / "rollouts" / f"{t}.parquet", samples, t)
    if not subproblem.supervised:
        drawn = [*samples, *rollout.dropped_samples(run.tokenizer)]
        run.problems.train.record(success_rates(drawn, subproblem.is_correct))
        iteration.values |= rollout_values(samples) | source_values(samples, subproblem)
        if run.config.rollout.staleness:
            iteration.values |= staleness_values(samples, t)
    steps = batching.steps_of_groups(np.array([s.group for s in samples]), run.config.batch.prompts_per_step)
    examples = _examples(run, len(steps))
    everything, temperature = [*samples, *examples], subproblem.temperature
    described = RolloutBatch.describe(everything, temperature, examples=len(examples), weight_version=t)
    return described, everything


def _end_if_cut(run: Trainer, rollout: RolloutGroups | None, what: str) -> None:
    """Raises RunEnds, on all ranks, after a rollout that was ended because the run has to end."""
    cut = rollout is not None and run.rollouts.live and not rollout.may_end
    if run.control.from_driver(cut):
        reason = run.control.from_driver(run.shutdown.reason_before("rollout"))
        raise RunEnds(RunOutcome(Status.SAVED, f"{reason}; the {what} was cut short"))


def _examples(run: Trainer, steps: int) -> list[Sample]:
    """The supervised examples of an iteration of so many optimizer steps: one cut short has fewer."""
    ptx, source = run.config.algorithm.ptx, run.problems.supervised
    if ptx is None or source is None:
        return []
    return demonstrations(source.take(ptx.examples_per_step * steps), run.tokenizer)


def release(run: Trainer, iteration: Iteration) -> None:
    """The engines leave the device to the actor; between the two, what neither can release is measured.

    Only then is the device as empty as it gets. After the first iteration all process groups have talked, and
    have their buffers.
    """
    run.rollouts.release()
    if torch.cuda.is_available() and run.config.rollout.placement == "colocated":
        ranks = run.control.gather(device_memory())
        if ranks:
            iteration.values["device/left_over_gigabytes"] = max(m.total - m.free for m in ranks) / 1e9
            if run.begun == 2:
                run.log.say(describe_left_overs(ranks))
    run.actor.wake()


def schedule(run: Trainer, batch: RolloutBatch) -> list[batching.Microbatches]:
    """This rank's micro-batches of each optimizer step. StaleWeights if versions are mixed unasked."""
    rollout = run.config.rollout
    batch.refuse_undeclared_versions(rollout.partial.max_staleness if rollout.partial else rollout.staleness)
    return [run.actor.microbatches(batch, samples) for samples in _responses_of_steps(run, batch)]


def _responses_of_steps(run: Trainer, batch: RolloutBatch) -> list[np.ndarray]:
    groups = batch.samples.groups[: batch.sampled]
    return batching.steps_of_groups(groups, run.config.batch.prompts_per_step)


def _examples_of_step(run: Trainer, batch: RolloutBatch, step: int) -> np.ndarray:
    """Which samples are the supervised examples of an optimizer step; none without algorithm.ptx."""
    ptx = run.config.algorithm.ptx
    per_step = ptx.examples_per_step if ptx else 0
    return batch.sampled + step * per_step + np.arange(per_step)


def _trained_here(run: Trainer, batch: RolloutBatch) -> np.ndarray:
    """The samples that this rank trains on, in any step."""
    responses = _responses_of_steps(run, batch)
    examples = [_examples_of_step(run, batch, step) for step in range(len(responses))]
    return run.actor.share(batch, [*responses, *examples])


def anchor(
    run: Trainer, iteration: Iteration, batch: RolloutBatch, steps: list[batching.Microbatches]
) -> AnchorReport:
    """log π_t of every sampled token; compares it with what the engines computed for the same weights.

    With algorithm.anchor=engine it is what the engines computed, and only the first step's is compared.
    Raises StaleWeights on all ranks when the difference is more than numerics explain.
    """
    if Subproblem(run.config, iteration.number).supervised:
        return AnchorReport.absent(len(batch.tokens))
    engine = run.config.algorithm.anchor == "engine"
    compared = steps[:1] if engine else steps
    report = run.actor.log_probs(batch, [microbatch for step in compared for microbatch in step])
    # what a person looks at when a check or a loss fails; and ranks that end take the driver with them
    run.control.on_driver(run.rollout_writer.wait)
    iteration.values |= _agreement(run, batch, report)
    if run.config.model.precision != "fp32" and iteration.number < run.config.iterations:
        iteration.values |= _noise_floor(run, batch, steps[0], report)
    if engine:
        return dataclasses.replace(report, log_probs=torch.from_numpy(batch.tokens.engine_log_probs))
    return report


def _noise_floor(
    run: Trainer, batch: RolloutBatch, microbatches: batching.Microbatches, once: AnchorReport
) -> dict[str, float]:
    """What kl_anchor and drift would be if π_θ were π_t: the anchor of a few responses computed once more."""
    layout = run.config.layout
    few = microbatches[: layout.pipeline if layout.virtual_pipeline > 1 else 1]
    with rounded_anew(run.actor.chunks):
        again = run.actor.log_probs(batch, few)
    return floor_values(run.control.all_gather(FloorReport.of(batch, few, once.log_probs, again.log_probs)))


def _agreement(run: Trainer, batch: RolloutBatch, report: AnchorReport) -> dict[str, float]:
    """Actor against engines, over all ranks. Raises StaleWeights beyond the configured bounds."""
    reports = run.control.all_gather(dataclasses.replace(report, log_probs=torch.empty(0)))
    values, tokens = anchor_values(reports), sum(r.tokens for r in reports)
    causes = "the engines do not serve the actor's weights, or the two compute another model"
    if report.expert_tokens and not run.config.actor.experts.replay_routing:
        causes += ", or their routers chose otherwise: see actor.experts.replay_routing"
    if tokens:
        refuse_disagreement(values, run.config.log_prob_bounds, batch.weight_version, tokens, causes)
    if run.config.rollout.staleness:
        values["sync/compared_tokens"] = tokens
    return values


def refuse_disagreement(
    values: dict[str, float], bounds: tuple[float, float], version: int, tokens: int, causes: str
) -> None:
    """StaleWeights where anchor_values() are beyond the bounds on the mean and the 99th percentile.

    Not on the largest: of tens of millions of tokens some always are where two experts are nearly as good.
    """
    mean, p99 = values["sync/mean_abs_difference"], values["mismatch/p99_abs"]
    if mean <= bounds[0] and p99 <= bounds[1]:
        return
    raise StaleWeights(
        f"the engines' log-probabilities under weight version {version} differ from the actor's by "
        f"{mean:.2e} on average, by {p99:.2e} at the 99th percentile and by "
        f"{values['sync/max_abs_difference']:.2e} at most over {tokens} sampled tokens (bounds on the first "
        f"two: {bounds[0]:g} and {bounds[1]:g}): {causes}"
    )


def update(
    run: Trainer,
    iteration: Iteration,
    batch: RolloutBatch,
    microbatches: batching.Microbatches,
    anchor: AnchorReport,
    *,
    step: int,
) -> None:
    """One optimizer step on the objective, and its diagnostics."""
    run.rollouts.attend()
    if step == 0 and run.config.optimizer.reset_every_iteration:
        run.actor.reset_optimizer()
    subproblem = Subproblem(run.config, iteration.number)
    global_step = iteration.number * run.config.batch.steps_per_rollout + step
    rate = learning_rate(run.config.optimizer, global_step)
    examples = _examples_of(run, batch, subproblem, step)
    report = run.actor.update(batch, microbatches, anchor.log_probs, subproblem.loss, rate, examples)
    reports = run.control.gather(report)
    if reports is not None:
        values = step_values(batch, reports, subproblem)
        iteration.steps.append(values)
        run.log.log("step", {"step": step, "global_step": global_step, **values})


def _examples_of(run: Trainer, batch: RolloutBatch, subproblem: Subproblem, step: int) -> Examples | None:
    """This rank's supervised examples of one optimizer step."""
    ptx = run.config.algorithm.ptx
    if ptx is None:
        return None
    examples, responses = _examples_of_step(run, batch, step), _responses_of_steps(run, batch)[step]
    mean = 1 / int(batch.samples.response_lengths[examples].sum())
    return Examples(
        microbatches=run.actor.microbatches(batch, examples),
        scale=ptx.weight * mean * subproblem.count(batch, responses),
    )


def conclude(run: Trainer, iteration: Iteration, batch: RolloutBatch) -> RunOutcome | None:
    """Log what an iteration came to, and compare it with those before; an outcome if an alarm ends the run.

    Before the checkpoint: a run that is to end writes one. From here on its rollout's file is there.
    """
    run.rollout_writer.wait()
    ending = None
    if run.control.is_driver:
        t, alarms = iteration.number, run.config.alarms
        iteration.values |= over_iteration(iteration.steps)
        found = raised(iteration.values, run.log.iterations_before(t), alarms.thresholds())
        for name, reason in found.items():
            run.log.say(f"alarm {name}: {reason}")
            if alarms.stops(name):
                ending = RunOutcome(Status.ALARMED, f"alarm {name} in iteration {t}: {reason}")
        seconds = run.log.seconds_by_phase(t)
        iteration.values |= {"alarms": len(found), "weight_version": t}
        iteration.values |= throughput(batch, seconds, run.config, iteration.sampled_tokens)
        run.log.log("iteration", iteration.values)
    return run.control.from_driver(ending)


def checkpoint_is_due(run: Trainer, completed: int) -> bool:
    every = run.config.checkpoint.every
    return completed == run.config.iterations or (every is not None and completed % every == 0)


def save(run: Trainer) -> None:
    """Begin a checkpoint of the run as it stands, with what is sampled ahead by now."""
    run.rollouts.refresh()
    run.remember_ahead()
    run.checkpoints.begin(run.state)


def evaluation_is_due(run: Trainer, t: int) -> bool:
    """Before the first iteration, every so many, and after the last (t = iterations)."""
    if run.config.data.evaluation is None or not run.rollouts.live:
        return False
    every = run.config.evaluation.every
    return t in (0, run.config.iterations) or (every is not None and t % every == 0)


def evaluate(run: Trainer, t: int) -> None:
    """Sample the held-out problems under weight version t, and keep the samples."""
    rollout = evaluation_rollout(run.config, run.problems.held_out, t) if run.control.is_driver else None
    samples = run.rollouts.draw(rollout, run.actor, "evaluation")
    _end_if_cut(run, rollout, "evaluation")
    if run.control.is_driver:
        write_rollout(run.folder / "evaluations" / f"{t}.parquet", samples, t)
        sources = run.config.problem_sources("evaluation")
        correct = {source.name: source.reward.correct for source in sources}
        run.log.log("evaluation", estimate(samples, correct).metrics())


def finish(run: Trainer) -> None:
    """Evaluate and check the final weights, and export them."""
    final = run.config.iterations
    run.log.begin_iteration(final)
    if evaluation_is_due(run, final):
        with run.phase("evaluate"):
            evaluate(run, final)
    if run.rollouts.live:
        with run.phase("check"):
            _check_final_weights(run, final)
    else:
        run.actor.wake()
    if run.config.checkpoint.hf_export:
        with run.phase("export"):
            exports.write(run, final)
    with run.phase("save"):
        run.checkpoints.publish(wait=True)


def _check_final_weights(run: Trainer, final: int) -> None:
    """No rollout follows the last sync to check it: draw one sample of each of a few prompts."""
    rollout = None
    if run.control.is_driver:
        problems = run.problems.train.peek(min(8, run.config.batch.prompts_per_rollout))
        rollout = check_rollout(run.config, problems, final)
    samples = run.rollouts.draw(rollout, run.actor, "check of the final weights")
    samples = [sample for sample in samples if len(sample.response_tokens)]  # the others were refused
    _end_if_cut(run, rollout, "check of the final weights")
    run.rollouts.release()
    run.actor.wake()
    if not run.control.from_driver(bool(samples)):
        run.log.say("the final weights are not checked: no response to a prompt could be begun")
        return
    temperature = Subproblem(run.config, final).temperature
    described = RolloutBatch.describe(samples, temperature) if samples else None
    batch = distribute(described, samples, run.actor.share_of_all, run.control, say=run.log.say)
    everything = [run.actor.microbatches(batch, np.arange(len(batch)))]
    anchor(run, Iteration(final, left_over=[]), batch, everything)


def end_early(run: Trainer, outcome: RunOutcome) -> RunOutcome:
    """Leave a checkpoint of the iterations that are complete, if the run is to go on; says where it is."""
    run.rollout_writer.wait()
    if outcome.status is Status.STOPPED:
        return outcome
    run.checkpoints.publish(wait=True)
    completed = run.state.completed
    where, then = f"{run.checkpoints.path(completed)} is there", "the same command goes on from it"
    if not run.checkpoints.exists(completed):
        run.rollouts.release()
        run.actor.wake()
        with run.phase("save"):
            save(run)
            run.checkpoints.publish(wait=True)
        where = f"{run.checkpoints.path(completed)} was written"
    if outcome.status is Status.ALARMED:
        then += " with another threshold or action of this alarm"
    return dataclasses.replace(outcome, reason=f"{outcome.reason}; {where}: {then}")
