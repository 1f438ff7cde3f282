"""One training run on one rank: the parts that the loop moves, and what each phase does with them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil

from megatron_pmd.actor import batching
from megatron_pmd.actor.actor import Actor, AnchorReport, StepReport
from megatron_pmd.actor.optimizer import learning_rate
from megatron_pmd.actor.parallel import Control
from megatron_pmd.algorithm.diagnostics import diagnostics
from megatron_pmd.algorithm.losses import pmd
from megatron_pmd.config import RunConfig, StopAfter
from megatron_pmd.data.problems import Problem
from megatron_pmd.data.prompts import PromptSource
from megatron_pmd.errors import StaleWeights
from megatron_pmd.evaluation import evaluate
from megatron_pmd.observe.console import Console
from megatron_pmd.observe.journal import Journal, Phase
from megatron_pmd.rollout.samples import RolloutBatch, Sample, write_rollout
from megatron_pmd.rollout.source import (
    LiveEngines,
    ReplayedRollouts,
    evaluation_plan,
    set_advantages,
    train_plan,
)
from megatron_pmd.warm_start import warm_start

T = TypeVar("T")

# mean and largest |log π_actor − log π_engine| that kernels of one precision explain (docs/benchmarks.md)
LOG_PROB_BOUNDS = {"fp32": (1e-5, 1e-3), "bf16": (1e-1, 5.0)}


class StopRequested(Exception):
    """The user asked the run to stop after this phase; it is not complete, and nothing failed."""


class Run:
    """State of a run; every rank has one. journal, train and held_out exist on the driver alone."""

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        control: Control,
        actor: Actor,
        rollouts: LiveEngines | ReplayedRollouts,
        console: Console,
        *,
        journal: Journal | None,
        train: PromptSource | None,
        held_out: list[Problem],
        tokenizer: Any,
        first_iteration: int,
        stop_after: StopAfter | None,
    ) -> None:
        self.config, self.folder, self.control = config, folder, control
        self.actor, self.rollouts = actor, rollouts
        self._console, self._journal, self._train, self._held_out = console, journal, train, held_out
        self._tokenizer, self._first, self._stop_after = tokenizer, first_iteration, stop_after
        self._iteration_values: dict[str, float] = {}
        self._seconds: dict[str, float] = {}
        self._objective = functools.partial(
            pmd,
            tau=config.algorithm.tau,
            normaliser=config.algorithm.normaliser,
            max_response_tokens=config.batch.max_response_tokens,
        )

    @property
    def journal(self) -> Journal:
        assert self._journal is not None, "only the driver keeps a journal"
        return self._journal

    @contextmanager
    def phase(self, name: str) -> Iterator[Phase]:
        """Time a phase and note what is in memory at its end."""
        with self._journal.phase(name) if self._journal else nullcontext(Phase(name)) as record:
            yield record
            memory = self.control.gather((psutil.Process().memory_info().rss, self.rollouts.engine_bytes()))
            if memory:
                record.actor_bytes, record.engine_bytes = (
                    sum(column) for column in zip(*memory, strict=True)
                )
        self._seconds[name] = record.seconds

    def progress(self, steps: list[T]) -> Iterable[T]:
        """The steps, with a bar on the driver."""
        if not self.control.is_driver:
            yield from steps
            return
        with self._console.progress("update", len(steps)) as advance:
            for step in steps:
                yield step
                advance()

    def start(self) -> None:
        """Warm start if the recipe asks for one, then the engines take the actor's weights."""
        if self.config.warm_start and self._first == 0:
            with self.phase("warm_start"):
                warm_start(self.actor, self.control, self.config, self._train, self._tokenizer, self._journal)
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
            self._iteration_values = {}
            yield t

    def collect(self, t: int) -> RolloutBatch:
        """Draw and grade the rollout of iteration t; every rank gets it as packed arrays."""
        plan = None
        if self.control.is_driver:
            assert self._train is not None
            problems = self._train.take(self.config.batch.prompts_per_rollout)
            plan = train_plan(self.config, problems, t)
        samples = self.rollouts.draw(plan, self.actor, "rollout")
        batch: RolloutBatch | None = None
        if self.control.is_driver:
            set_advantages(samples, self.config)
            write_rollout(self.folder / "rollouts" / f"{t}.parquet", samples, t)
            self._note_rollout(samples)
            batch = RolloutBatch.pack(samples, weight_version=t)
        batch = self.control.from_driver(batch)
        if self._stop_after == "rollout":
            raise StopRequested
        return batch

    def _note_rollout(self, samples: list[Sample]) -> None:
        lengths = [len(s.response_tokens) for s in samples]
        self._iteration_values |= {
            "reward": float(np.mean([s.reward for s in samples])),
            "reward_deviation": float(np.std([s.reward for s in samples])),
            "response_tokens": float(np.mean(lengths)),
            "response_tokens/max": float(np.max(lengths)),
            "truncated_share": float(np.mean([s.finish_reason == "length" for s in samples])),
            "reward_errors": sum(s.reward_error is not None for s in samples),
        }

    def schedule(self, batch: RolloutBatch) -> list[batching.Microbatches]:
        """This rank's micro-batches of each optimizer step. StaleWeights if versions are mixed unasked."""
        batch.refuse_undeclared_versions(max_staleness=0)
        steps = batching.steps_of_groups(batch.groups, self.config.batch.prompts_per_step)
        return [self.actor.microbatches(batch, samples) for samples in steps]

    def anchor(self, batch: RolloutBatch, steps: list[batching.Microbatches]) -> AnchorReport:
        """log π_t of every sampled token; compares it with what the engines computed for the same weights.

        Raises StaleWeights on all ranks when the difference is more than numerics explain.
        """
        report = self.actor.log_probs(batch, [microbatch for step in steps for microbatch in step])
        parts = self.control.all_gather(
            (report.tokens, report.sum_absolute, report.max_absolute, report.entropy_sum)
        )
        tokens = sum(part[0] for part in parts)
        mean, largest = sum(part[1] for part in parts) / max(tokens, 1), max(part[2] for part in parts)
        self._iteration_values |= {
            "sync/mean_abs_difference": mean,
            "sync/max_abs_difference": largest,
            "entropy": sum(part[3] for part in parts) / max(tokens, 1),
        }
        defaults = LOG_PROB_BOUNDS[self.config.model.precision]
        mean_bound = self.config.sync.mean_log_prob_difference or defaults[0]
        max_bound = self.config.sync.max_log_prob_difference or defaults[1]
        if not (mean <= mean_bound and largest <= max_bound):
            raise StaleWeights(
                f"the engines' log-probabilities under weight version {batch.weight_version} differ from the "
                f"actor's by {mean:.2e} on average and {largest:.2e} at most over {tokens} sampled tokens "
                f"(bounds {mean_bound:g} and {max_bound:g}): "
                "the engines do not serve the actor's weights, or the two compute another model"
            )
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
        """One optimizer step on the PMD loss, and its diagnostics."""
        global_step = iteration * self.config.batch.steps_per_rollout + step
        rate = learning_rate(self.config.optimizer, global_step)
        report = self.actor.update(batch, microbatches, anchor.log_probs, self._objective, rate)
        reports = self.control.gather(report)
        if reports is not None:
            values = self._step_values(batch, reports)
            self.journal.log("step", {"step": step, "global_step": global_step, **values})

    def _step_values(self, batch: RolloutBatch, reports: list[StepReport]) -> dict[str, float]:
        reporting = [r for r in reports if len(r.samples)]
        samples = np.concatenate([r.samples for r in reporting])
        per_sequence = {
            name: np.concatenate([r.per_sequence[name] for r in reporting])
            for name in reporting[0].per_sequence
        }
        return {
            "loss": sum(r.loss_sum for r in reports) / sum(r.loss_count for r in reports),
            "gradient_norm": reports[0].gradient_norm,
            "learning_rate": reports[0].learning_rate,
            **diagnostics(
                per_sequence,
                advantage=batch.advantages[samples],
                reward=batch.rewards[samples],
                group=batch.groups[samples],
                baseline=self.config.algorithm.baseline,
                tau=self.config.algorithm.tau,
            ),
        }

    def evaluation_is_due(self, t: int) -> bool:
        """Before the first iteration, every so many, and after the last (t = iterations)."""
        if self.config.data.evaluation is None or isinstance(self.rollouts, ReplayedRollouts):
            return False
        every = self.config.evaluation.every
        return t in (0, self.config.iterations) or (every is not None and t % every == 0)

    def evaluate(self, t: int) -> None:
        """Sample the held-out problems under weight version t, and keep the samples."""
        plan = evaluation_plan(self.config, self._held_out, t) if self.control.is_driver else None
        samples = self.rollouts.draw(plan, self.actor, "evaluation")
        if self.control.is_driver:
            write_rollout(self.folder / "evaluations" / f"{t}.parquet", samples, t)
            self.journal.log("evaluation", evaluate(samples).metrics())

    def checkpoint_is_due(self, completed: int) -> bool:
        every = self.config.checkpoint.every
        return completed == self.config.iterations or (every is not None and completed % every == 0)

    def save(self, completed: int) -> None:
        """Checkpoint after `completed` iterations; weight version and iteration are the same number."""
        prompts = self._train.state() if self._train else None
        state = self.control.from_driver({"iteration": completed, "prompts": prompts})
        self.actor.save(self.folder / "checkpoints", completed, state)

    def end_iteration(self, t: int, batch: RolloutBatch) -> None:
        """Log what the iteration came to and show it."""
        if not self.control.is_driver:
            return
        seconds = self._seconds
        self._iteration_values |= {
            "weight_version": t,
            "rollout/tokens_per_second": int(batch.response_lengths.sum()) / seconds["rollout"],
            "anchor/tokens_per_second": len(batch.tokens) / seconds["anchor"],
            "update/tokens_per_second": len(batch.tokens) / seconds["update"],
        }
        self.journal.log("iteration", self._iteration_values)
        self._console.iteration(self.journal.record(t))

    def finish(self) -> None:
        """Evaluate and check the final weights, and export them."""
        final = self.config.iterations
        if self._journal:
            self._journal.iteration(final)
        if self.evaluation_is_due(final):
            with self.phase("evaluate"):
                self.evaluate(final)
        if isinstance(self.rollouts, LiveEngines):
            with self.phase("check"):
                self._check_final_weights(final)
        else:
            self.actor.wake()
        if self.config.checkpoint.hf_export:
            with self.phase("export"):
                self.actor.save_hf(self.folder / "hf" / f"iteration-{final}")

    def _check_final_weights(self, final: int) -> None:
        """No rollout follows the last sync to check it: draw one sample of each of a few prompts."""
        plan = None
        if self.control.is_driver:
            assert self._train is not None
            problems = self._train.peek(min(8, self.config.batch.prompts_per_rollout))
            plan = dataclasses.replace(
                train_plan(self.config, problems, final), samples_per_prompt=1, stream="check"
            )
        samples = self.rollouts.draw(plan, self.actor, "check of the final weights")
        batch = self.control.from_driver(RolloutBatch.pack(samples) if samples else None)
        self.rollouts.release()
        self.actor.wake()
        self.anchor(batch, [self.actor.microbatches(batch, np.arange(len(batch)))])
