"""One training run on one rank: the parts that the loop moves, and what each phase does with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from megatron_pmd.actor import batching
from megatron_pmd.actor.actor import Actor, AnchorReport, Examples
from megatron_pmd.actor.expert_load import imbalance
from megatron_pmd.actor.optimizer import learning_rate
from megatron_pmd.actor.residency import resident_bytes
from megatron_pmd.algorithm.alarms import raised
from megatron_pmd.algorithm.diagnostics import histogram_quantile, over_iteration
from megatron_pmd.batch import RolloutBatch, Sample, write_rollout
from megatron_pmd.config import RunConfig, StopAfter
from megatron_pmd.convert.live import write_policy
from megatron_pmd.data.demonstrations import demonstrations
from megatron_pmd.data.problem_sets import ProblemSets
from megatron_pmd.distributed import Control
from megatron_pmd.errors import AlarmStop, StaleWeights
from megatron_pmd.evaluation.estimates import evaluate
from megatron_pmd.observe.console import Console
from megatron_pmd.observe.journal import Journal, Phase
from megatron_pmd.observe.subphases import together
from megatron_pmd.rollout.groups import Group, SamplingPlan
from megatron_pmd.rollout.metrics import plan_metrics, rollout_values
from megatron_pmd.training.checkpoints import Saving
from megatron_pmd.training.metrics import step_values, success_rates
from megatron_pmd.training.rollouts import RolloutSource, check_plan, evaluation_plan, train_plan
from megatron_pmd.training.shares import distribute
from megatron_pmd.training.shutdown import CHECKED, Ending, HaltRequested
from megatron_pmd.training.subproblem import Subproblem
from megatron_pmd.training.warm_start import warm_start

T = TypeVar("T")

# mean and largest |log π_actor − log π_engine| that kernels of one precision explain (docs/benchmarks.md)
LOG_PROB_BOUNDS = {"fp32": (1e-5, 1e-3), "bf16": (1e-1, 5.0)}


class StopRequested(Exception):
    """The user asked the run to stop after this phase; it is not complete, and nothing failed."""


class Run:
    """State of a run; every rank has one. journal and problems exist on the driver alone."""

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        control: Control,
        actor: Actor,
        rollouts: RolloutSource,
        console: Console,
        *,
        journal: Journal | None,
        problems: ProblemSets | None,
        tokenizer: Any,
        kept: list[Group],
        first_iteration: int,
        stop_after: StopAfter | None,
        ending: Ending,
        resumed: bool,
    ) -> None:
        self.config, self.folder, self.control = config, folder, control
        self.actor, self.rollouts = actor, rollouts
        self._console, self._journal, self._problems = console, journal, problems
        self._kept = kept  # responses that the next rollout continues
        self._tokenizer, self._first, self._stop_after = tokenizer, first_iteration, stop_after
        self._ending, self._resumed, self._completed = ending, resumed, first_iteration
        self._saving = Saving(folder, control, actor, ending)
        self._unreported: RolloutBatch | None = None
        """Of an iteration whose update is complete, until its line is logged."""
        self._iteration_values: dict[str, float] = {}
        self._steps: list[dict[str, float]] = []
        self._seconds: dict[str, float] = {}
        self._alarm_to_stop: str | None = None

    @property
    def journal(self) -> Journal:
        assert self._journal is not None, "only the driver keeps a journal"
        return self._journal

    @property
    def problems(self) -> ProblemSets:
        assert self._problems is not None, "only the driver draws problems"
        return self._problems

    @contextmanager
    def phase(self, name: str) -> Iterator[Phase]:
        """Time a phase and note what is in memory at its end.

        Raises HaltRequested, on all ranks, when the run has to end before it.
        """
        if name in CHECKED:
            for reason in self.control.all_gather(self._ending.reason_before(name)):
                if reason:
                    raise HaltRequested(reason)
        with self._journal.phase(name) if self._journal else nullcontext(Phase(name)) as record:
            yield record
            self._saving.publish(wait=False)
            mine = (
                resident_bytes(), self.rollouts.engine_bytes(), self.rollouts.parts.take()
            )  # fmt: skip
            ranks = self.control.gather(mine)
            if ranks:
                actor, engine, parts = zip(*ranks, strict=True)
                record.actor_bytes, record.engine_bytes = sum(actor), sum(engine)
                record.parts = together(list(parts))
        self._seconds[name] = record.seconds
        self._ending.expect(name, record.seconds)
        if name == "update":
            self._completed += 1
            self._unreported = self._batch
            self._note(self._kept)

    def progress(self, steps: list[T]) -> Iterable[T]:
        """The steps, with a bar on the driver."""
        if not self.control.is_driver:
            yield from steps
            return
        with self._console.progress("update", len(steps)) as advance:
            for step in steps:
                yield step
                advance()

    def _note(self, kept: list[Group]) -> None:
        self._saving.note(self._problems.state() if self._problems else {}, kept)

    def halt(self) -> str:
        """Write a checkpoint of the iterations that are complete, unless there is one; says which it is."""
        if self._unreported is not None:
            self.end_iteration(self._completed - 1, self._unreported)
        checkpoint = self._saving.path(self._completed)
        self._saving.publish(wait=True)
        if self.control.from_driver(checkpoint.exists()):
            return f"{checkpoint} is there already"
        self.rollouts.release()
        self.actor.wake()
        with self.phase("save"):
            self.save(self._completed)
            self._saving.publish(wait=True)
        return f"{checkpoint} was written"

    def start(self) -> None:
        """Warm start if the recipe asks for one, then the engines take the actor's weights."""
        if self.config.warm_start and not self._resumed:
            train = self._problems.train if self._problems else None
            with self.phase("warm_start"):
                warm_start(self.actor, self.control, self.config, train, self._tokenizer, self._journal)
        with self.phase("start"):
            self.actor.release_optimizer()
            self.rollouts.load(self.actor, version=self._first)
            self.actor.release_parameters()
            self.rollouts.resume()

    def iterations(self) -> Iterator[int]:
        """The iterations still to be trained; what is noted in between belongs to the one last yielded."""
        for t in range(self._first, self.config.iterations):
            if self._journal:
                self._journal.iteration(t)
            self._iteration_values, self._steps = {}, []
            self._note(self._kept)
            yield t

    def collect(self, t: int) -> RolloutBatch:
        """Draw and grade the rollout of iteration t; every rank gets it as packed arrays."""
        plan = None
        if self.control.is_driver:
            plan = train_plan(self.config, self.problems.train, t, self._kept)
        samples = self._draw(plan, "rollout")
        if plan is not None and self.rollouts.live:
            self._note(plan.groups)
        batch: RolloutBatch | None = None
        packed: list[Sample] = []
        if plan is not None:
            if self.rollouts.live:
                self._kept = plan.kept
                self._iteration_values |= plan_metrics(plan)
            subproblem = Subproblem(self.config, t)
            subproblem.grade(samples)
            write_rollout(self.folder / "rollouts" / f"{t}.parquet", samples, t)
            if not subproblem.supervised:
                drawn = [*samples, *plan.dropped_samples(self._tokenizer)]
                self.problems.train.record(success_rates(drawn, self.config.reward.correct))
                self._iteration_values |= rollout_values(samples)
            examples = self._examples()
            packed = [*samples, *examples]
            batch = RolloutBatch.describe(
                packed, subproblem.temperature, examples=len(examples), weight_version=t
            )
        self._batch = batch = distribute(
            batch, packed, self._trained_here, self.control, say=self._console.say
        )
        if self.config.actor.experts.replay_routing:
            batch.check_routing(self.actor.routing_width)
        if self._stop_after == "rollout":
            raise StopRequested
        return batch

    def _draw(self, plan: SamplingPlan | None, title: str) -> list[Sample]:
        """The plan's samples. Raises HaltRequested, on all ranks, when the run has to end before."""
        samples = self.rollouts.draw(plan, self.actor, title)
        cut = plan is not None and self.rollouts.live and not plan.may_end
        if self.control.from_driver(cut):
            if plan is not None and title == "rollout":
                self._note(plan.groups)
            reason = self.control.from_driver(self._ending.reason_before("rollout"))
            raise HaltRequested(f"{reason}; the {title} was cut short")
        return samples

    def _examples(self) -> list[Sample]:
        """The iteration's supervised examples."""
        ptx, source = self.config.algorithm.ptx, self.problems.supervised
        if ptx is None or source is None:
            return []
        count = ptx.examples_per_step * self.config.batch.steps_per_rollout
        return demonstrations(source.take(count), self._tokenizer)

    def schedule(self, batch: RolloutBatch) -> list[batching.Microbatches]:
        """This rank's micro-batches of each optimizer step. StaleWeights if versions are mixed unasked."""
        partial = self.config.rollout.partial
        batch.refuse_undeclared_versions(partial.max_staleness if partial else 0)
        return [self.actor.microbatches(batch, samples) for samples in self._responses_of_steps(batch)]

    def _responses_of_steps(self, batch: RolloutBatch) -> list[np.ndarray]:
        """The responses of each optimizer step."""
        groups = batch.groups[: batch.sampled]
        return batching.steps_of_groups(groups, self.config.batch.prompts_per_step)

    def _trained_here(self, batch: RolloutBatch) -> np.ndarray:
        """The samples that this rank trains on, examples included."""
        steps = self._responses_of_steps(batch)
        if self.config.algorithm.ptx is not None:
            steps = steps + [self._example_numbers(batch, step) for step in range(len(steps))]
        return self.actor.share(batch, steps)

    def _example_numbers(self, batch: RolloutBatch, step: int) -> np.ndarray:
        """Which samples are the supervised examples of an optimizer step."""
        ptx = self.config.algorithm.ptx
        assert ptx is not None, "asked only where there are some"
        first = batch.sampled + step * ptx.examples_per_step
        return np.arange(first, first + ptx.examples_per_step)

    def anchor(self, batch: RolloutBatch, steps: list[batching.Microbatches]) -> AnchorReport:
        """log π_t of every sampled token; compares it with what the engines computed for the same weights.

        With algorithm.anchor=engine it is what the engines computed, and only the first step's is compared.
        Raises StaleWeights on all ranks when the difference is more than numerics explain.
        """
        if self.config.algorithm.objective == "sft":
            return AnchorReport.absent(len(batch.tokens))
        engine = self.config.algorithm.anchor == "engine"
        compared = steps[:1] if engine else steps
        report = self.actor.log_probs(batch, [microbatch for step in compared for microbatch in step])
        parts = self.control.all_gather(
            (
                report.tokens, report.sum_absolute, report.max_absolute, report.entropy_sum,
                report.histogram, report.expert_tokens,
            )
        )  # fmt: skip
        tokens = sum(part[0] for part in parts)
        mean, largest = sum(part[1] for part in parts) / max(tokens, 1), max(part[2] for part in parts)
        self._iteration_values |= {
            "sync/mean_abs_difference": mean,
            "sync/max_abs_difference": largest,
            "mismatch/p99_abs": histogram_quantile(np.sum([part[4] for part in parts], axis=0), 0.99),
            "entropy": sum(part[3] for part in parts) / max(tokens, 1),
            **imbalance([part[5] for part in parts]),
        }
        defaults = LOG_PROB_BOUNDS[self.config.model.precision]
        mean_bound = self.config.sync.mean_log_prob_difference or defaults[0]
        max_bound = self.config.sync.max_log_prob_difference or defaults[1]
        if not (mean <= mean_bound and largest <= max_bound):
            causes = "the engines do not serve the actor's weights, or the two compute another model"
            if report.expert_tokens and not self.config.actor.experts.replay_routing:
                causes += ", or their routers chose otherwise: see actor.experts.replay_routing"
            raise StaleWeights(
                f"the engines' log-probabilities under weight version {batch.weight_version} differ from the "
                f"actor's by {mean:.2e} on average and {largest:.2e} at most over {tokens} sampled tokens "
                f"(bounds {mean_bound:g} and {max_bound:g}): {causes}"
            )
        if engine:
            return dataclasses.replace(report, log_probs=torch.from_numpy(batch.engine_log_probs))
        return report

    def update(
        self,
        batch: RolloutBatch,
        microbatches: batching.Microbatches,
        anchor: AnchorReport,
        *,
        iteration: int,
        step: int,
    ) -> None:
        """One optimizer step on the objective, and its diagnostics."""
        if step == 0 and self.config.optimizer.reset_every_iteration:
            self.actor.reset_optimizer()
        subproblem = Subproblem(self.config, iteration)
        global_step = iteration * self.config.batch.steps_per_rollout + step
        rate = learning_rate(self.config.optimizer, global_step)
        examples = self._examples_of(batch, subproblem, step)
        report = self.actor.update(
            batch, microbatches, anchor.log_probs, subproblem.objective, rate, examples
        )
        reports = self.control.gather(report)
        if reports is not None:
            values = step_values(batch, reports, subproblem)
            self._steps.append(values)
            self.journal.log("step", {"step": step, "global_step": global_step, **values})

    def _examples_of(self, batch: RolloutBatch, subproblem: Subproblem, step: int) -> Examples | None:
        """This rank's supervised examples of one optimizer step."""
        ptx = self.config.algorithm.ptx
        if ptx is None:
            return None
        examples = self._example_numbers(batch, step)
        per_step = self.config.batch.samples_per_step
        responses = np.arange(step * per_step, (step + 1) * per_step)
        mean = 1 / int(batch.response_lengths[examples].sum())
        return Examples(
            microbatches=self.actor.microbatches(batch, examples),
            scale=ptx.weight * mean * subproblem.count(batch, responses),
        )

    def check_alarms(self, t: int) -> None:
        """Compare iteration t with those before it; collective, since an alarm may end the run.

        Called before the checkpoint: a run that is to stop writes one.
        """
        stopping = None
        if self.control.is_driver:
            self._iteration_values |= over_iteration(self._steps)
            earlier = self.journal.iterations_before(t)
            alarms = raised(self._iteration_values, earlier, self.config.alarms.thresholds())
            for name, reason in alarms.items():
                self._console.say(f"alarm {name}: {reason}")
                if self.config.alarms.stops(name):
                    stopping = f"alarm {name} in iteration {t}: {reason}"
            self._iteration_values["alarms"] = len(alarms)
        self._alarm_to_stop = self.control.from_driver(stopping)

    def evaluation_is_due(self, t: int) -> bool:
        """Before the first iteration, every so many, and after the last (t = iterations)."""
        if self.config.data.evaluation is None or not self.rollouts.live:
            return False
        every = self.config.evaluation.every
        return t in (0, self.config.iterations) or (every is not None and t % every == 0)

    def evaluate(self, t: int) -> None:
        """Sample the held-out problems under weight version t, and keep the samples."""
        plan = evaluation_plan(self.config, self.problems.held_out, t) if self.control.is_driver else None
        samples = self._draw(plan, "evaluation")
        if self.control.is_driver:
            write_rollout(self.folder / "evaluations" / f"{t}.parquet", samples, t)
            self.journal.log("evaluation", evaluate(samples, self.config.reward.correct).metrics())

    def checkpoint_is_due(self, completed: int) -> bool:
        every = self.config.checkpoint.every
        due = completed == self.config.iterations or (every is not None and completed % every == 0)
        return due or self._alarm_to_stop is not None

    def save(self, completed: int) -> None:
        """Begin a checkpoint after `completed` iterations; it appears when it is complete."""
        self._saving.begin(completed)

    def end_iteration(self, t: int, batch: RolloutBatch) -> None:
        """Log what the iteration came to and show it. Raises AlarmStop if an alarm is to end the run."""
        self._unreported = None
        if self.control.is_driver:
            seconds = self._seconds
            self._iteration_values |= {
                "weight_version": t,
                "rollout/tokens_per_second": int(batch.response_lengths.sum()) / seconds["rollout"],
                "anchor/tokens_per_second": int(batch.lengths.sum()) / seconds["anchor"],
                "update/tokens_per_second": int(batch.lengths.sum()) / seconds["update"],
            }
            self.journal.log("iteration", self._iteration_values)
            self._console.iteration(self.journal.record(t))
        if self._alarm_to_stop is not None:
            self._saving.publish(wait=True)
            raise AlarmStop(
                f"{self._alarm_to_stop}; a checkpoint was written. To go on from it, run the same command "
                "with another threshold or action of this alarm"
            )

    def finish(self) -> None:
        """Evaluate and check the final weights, and export them."""
        final = self.config.iterations
        if self._journal:
            self._journal.iteration(final)
        if self.evaluation_is_due(final):
            with self.phase("evaluate"):
                self.evaluate(final)
        if self.rollouts.live:
            with self.phase("check"):
                self._check_final_weights(final)
        else:
            self.actor.wake()
        if self.config.checkpoint.hf_export:
            with self.phase("export"):
                self.export(final)
        with self.phase("save"):
            self._saving.publish(wait=True)

    def export_is_due(self, done: int) -> bool:
        """After so many iterations; the last one's export comes with the end of the run."""
        every = self.config.checkpoint.hf_export_every
        final = self.config.checkpoint.hf_export and done == self.config.iterations
        return every is not None and done % every == 0 and not final

    def export(self, done: int) -> None:
        """Write the policy after so many iterations as a Hugging Face folder."""
        write_policy(
            self.actor.export(), self.actor.shapes.keys(), Path(self.config.model.path),
            self.folder / "hf" / f"iteration-{done}", self.control,
        )  # fmt: skip

    def _check_final_weights(self, final: int) -> None:
        """No rollout follows the last sync to check it: draw one sample of each of a few prompts."""
        plan = None
        if self.control.is_driver:
            problems = self.problems.train.peek(min(8, self.config.batch.prompts_per_rollout))
            plan = check_plan(self.config, problems, final)
        samples = self._draw(plan, "check of the final weights")
        temperature = Subproblem(self.config, final).temperature
        batch = distribute(
            RolloutBatch.describe(samples, temperature) if samples else None,
            samples,
            lambda batch: self.actor.share(batch, [np.arange(len(batch))]),
            self.control,
            say=self._console.say,
        )
        self.rollouts.release()
        self.actor.wake()
        self.anchor(batch, [self.actor.microbatches(batch, np.arange(len(batch)))])
