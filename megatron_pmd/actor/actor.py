"""The policy being trained: what the loop asks of the Megatron ranks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.optimizer.qk_clip import clip_qk
from megatron.core.utils import get_model_config

from megatron_pmd.actor import batching, checkpoint, lora, model, optimizer, residency, settings
from megatron_pmd.actor.expert_load import ExpertLoad, ExpertTokens
from megatron_pmd.actor.forward import run_schedule
from megatron_pmd.actor.log_probs import microbatch_log_probs
from megatron_pmd.actor.packing import PackedMicrobatch, Row
from megatron_pmd.actor.parallel import context_parallel_position, data_parallel_position, holds_logits
from megatron_pmd.actor.router_losses import RouterLosses
from megatron_pmd.actor.routing_replay import RoutingReplay
from megatron_pmd.algorithm.diagnostics import magnitude_histogram
from megatron_pmd.algorithm.losses import Loss, LossInput, LossTerms, next_token
from megatron_pmd.batch import RolloutBatch
from megatron_pmd.config import RunConfig
from megatron_pmd.device import SharedDevice, on_device
from megatron_pmd.distributed import Control
from megatron_pmd.errors import ModelError, NonFiniteLoss


@dataclass(frozen=True)
class AnchorReport:
    """log π_t of the sampled tokens that this rank trains on, and how far the engine's are from them.

    log_probs    fp32 [tokens here], NaN where another rank computes them
    sum_absolute, max_absolute   over |log π_t − log π_b| of those of this rank's response tokens that the
                 engines sampled under the batch's weight version; tokens counts them
    histogram    of the same differences, see diagnostics.magnitude_histogram
    entropy_sum  of all tokens of these responses that count in the loss, nats; counted counts them
    """

    log_probs: torch.Tensor
    sum_absolute: float
    max_absolute: float
    histogram: np.ndarray
    entropy_sum: float
    tokens: int
    counted: int
    expert_tokens: ExpertTokens = field(default_factory=dict)

    @classmethod
    def absent(cls, tokens: int) -> AnchorReport:
        """Of a batch that no policy was sampled for."""
        return cls(torch.zeros(tokens), 0.0, 0.0, magnitude_histogram([]), 0.0, 0, 0)


@dataclass(frozen=True)
class Examples:
    """Supervised examples beside the sampled responses of one optimizer step.

    scale: their summed next-token loss is multiplied by this before the step's global count divides it.
    """

    microbatches: batching.Microbatches
    scale: float


@dataclass(frozen=True)
class StepReport:
    """One optimizer step: the same on every rank, but for the sequences, which each replica counts itself.

    entropy_sum, tokens          over the counted response tokens of this replica; nats
    example_loss_sum, example_tokens   next-token loss of its supervised examples, unscaled
    """

    learning_rate: float
    gradient_norm: float
    loss_sum: float
    loss_count: int
    samples: np.ndarray
    per_sequence: dict[str, np.ndarray]
    entropy_sum: float
    tokens: int
    example_loss_sum: float
    example_tokens: int


@dataclass
class _StepSums:
    """What one optimizer step adds up over its micro-batches.

    It stays on the device until the step is done: each number asked for earlier is a wait of the host, and
    then of the device for the host's next kernels.
    """

    reports: list[tuple[PackedMicrobatch, LossTerms]] = field(default_factory=list)
    entropies: list[torch.Tensor] = field(default_factory=list)
    tokens: int = 0
    examples: list[LossTerms] = field(default_factory=list)

    def report(self, learning_rate: float, gradient_norm: float) -> StepReport:
        reports = self.reports
        names = reports[0][1].per_sequence if reports else {}
        return StepReport(
            learning_rate=learning_rate,
            gradient_norm=gradient_norm,
            loss_sum=sum(_numbers([terms.sum for _, terms in reports])),
            loss_count=int(sum(_numbers([terms.count for _, terms in reports]))),
            samples=np.array([s for microbatch, _ in reports for s in microbatch.samples], np.int64),
            per_sequence={
                name: torch.cat([terms.per_sequence[name] for _, terms in reports]).double().cpu().numpy()
                for name in names
            },
            entropy_sum=sum(_numbers(self.entropies), 0.0),
            tokens=self.tokens,
            example_loss_sum=sum(_numbers([terms.sum for terms in self.examples]), 0.0),
            example_tokens=int(sum(_numbers([terms.count for terms in self.examples]))),
        )


def _loss_input(
    batch: RolloutBatch, microbatch: PackedMicrobatch, log_probs: torch.Tensor, anchor: torch.Tensor
) -> LossInput:
    """What the loss is given of a micro-batch. log_probs: its own; anchor: as the batch's tokens."""
    known, source = batch.tokens, microbatch.source

    def here(values: torch.Tensor, which: Any) -> torch.Tensor:
        return on_device(values[which], log_probs.device)

    teacher = known.teacher_log_probs
    return LossInput(
        log_probs=log_probs,
        anchor_log_probs=here(anchor, source),
        engine_log_probs=here(torch.from_numpy(known.engine_log_probs), source),
        mask=here(torch.from_numpy(known.counted), source),
        sequence=microbatch.sequence,
        advantages=here(torch.from_numpy(batch.samples.advantages), microbatch.samples).float(),
        tau=here(torch.from_numpy(batch.samples.taus), microbatch.samples),
        teacher_log_probs=None if teacher is None else here(torch.from_numpy(teacher), source),
    )


def _numbers(values: list[torch.Tensor]) -> list[float]:
    """Scalars from the device, at one wait for all."""
    return torch.stack([value.detach().double() for value in values]).tolist() if values else []


class Actor:
    """One rank's part of the policy π_θ, its optimizer, and the passes over them."""

    def __init__(self, config: RunConfig, control: Control, device: SharedDevice | None = None) -> None:
        """Build the model from the configuration's folder and load its weights.

        device: the account that the engines keep, too.
        """
        settings.refuse_without_cuda(config)
        if torch.cuda.is_available():
            settings.check_device(config)
        self.config = config
        self._control = control
        self.bridge = model.load_bridge(
            Path(config.model.path), trust_remote_code=config.model.trust_remote_code
        )
        self.chunks = model.build(self.bridge, config)
        self.optimizer = optimizer.build(self.chunks, config)
        shared = config.rollout.placement == "colocated"
        self._residency = residency.Residency(
            self.chunks, self.optimizer, device or SharedDevice(), shared=shared
        )
        provider = get_model_config(self.chunks[0])
        rank, size = context_parallel_position()
        self._row = Row(settings.row_multiple(config), rank, size)
        self.shapes = model.tensors_of_policy(Path(config.model.path), provider.num_layers)
        work = settings.work(provider)
        self._tokens_at_equal_cost = batching.length_of_equal_cost(self.shapes, **work)
        self._replay = RoutingReplay(self.chunks) if config.actor.experts.replay_routing else None
        self._expert_load = ExpertLoad(self.chunks)
        self._router_losses = RouterLosses(provider, self._row)
        self.routing_width: int = provider.num_layers * provider.moe_router_topk
        """Experts that one token goes to, over all layers."""
        self._saver = checkpoint.Saver(
            control,
            keep=config.checkpoint.keep,
            asynchronous=config.checkpoint.asynchronous,
            by_hosts=config.hosts_gather_states,
        )

    def microbatches(self, batch: RolloutBatch, samples: np.ndarray) -> batching.Microbatches:
        """This rank's micro-batches of the given samples; every rank of a replica gets the same."""
        rank, size = data_parallel_position()
        layout, lengths = self.config.layout, self._row.padded(batch.samples.lengths[samples])
        costs = batching.attention_cost_tokens(lengths, self._tokens_at_equal_cost)
        shares = batching.pack(
            lengths,
            costs,
            ranks=size,
            max_tokens=self.config.tokens_per_pass,
            # an interleaved pipeline moves micro-batches in groups of as many as it has stages
            multiple=layout.pipeline if layout.virtual_pipeline > 1 else 1,
        )
        return [[int(samples[i]) for i in bin_] for bin_ in shares[rank]]

    def share(self, batch: RolloutBatch, steps: Iterable[np.ndarray]) -> np.ndarray:
        """Of the samples of these optimizer steps, those that this rank's replica trains on, ascending."""
        microbatches = [m for samples in steps for m in self.microbatches(batch, samples)]
        return np.array(sorted(set(itertools.chain(*microbatches))), np.int64)

    def share_of_all(self, batch: RolloutBatch) -> np.ndarray:
        """share(), of one step on all samples."""
        return self.share(batch, [np.arange(len(batch))])

    @torch.no_grad()
    def log_probs(self, batch: RolloutBatch, microbatches: batching.Microbatches) -> AnchorReport:
        """One forward pass over the micro-batches: log π of each response token under the current weights."""
        result = torch.full((len(batch.tokens),), torch.nan)
        entropy_sum = torch.zeros(())
        counted = torch.from_numpy(batch.tokens.counted)
        current = torch.from_numpy(batch.tokens.policies == batch.weight_version)
        parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

        def keep(microbatch: PackedMicrobatch, logits: torch.Tensor) -> None:
            parts.append((microbatch.source, *self._token_log_probs(batch, microbatch, logits)))

        with self._expert_load.counting() as expert_tokens, lora.without_dropout(self.chunks):
            self._run(batch, microbatches, keep, forward_only=True)
        for source, log_probs, entropy in parts:
            result[source] = log_probs.cpu()
            entropy_sum.add_(entropy.cpu()[counted[source]].sum())
        computed = ~result.isnan() if holds_logits() else torch.zeros_like(result, dtype=torch.bool)
        compared = computed & current
        difference = (result - torch.from_numpy(batch.tokens.engine_log_probs))[compared].abs().double()
        return AnchorReport(
            log_probs=result,
            sum_absolute=float(difference.sum()),
            max_absolute=float(difference.max()) if len(difference) else 0.0,
            histogram=magnitude_histogram(difference.numpy()),
            entropy_sum=float(entropy_sum) if holds_logits() else 0.0,
            tokens=len(difference),
            counted=int((computed & counted).sum()),
            expert_tokens=expert_tokens,
        )

    def update(
        self,
        batch: RolloutBatch,
        microbatches: batching.Microbatches,
        anchor: torch.Tensor,
        objective: Loss,
        learning_rate: float,
        examples: Examples | None = None,
    ) -> StepReport:
        """One optimizer step on the objective, its gradient divided by the global count of what it counts.

        Raises NonFiniteLoss on all ranks; what is saved of the run is then its last checkpoint.
        """
        sums = _StepSums()

        def loss(
            microbatch: PackedMicrobatch, logits: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor, None]:
            log_probs, entropy = self._token_log_probs(batch, microbatch, logits)
            x = _loss_input(batch, microbatch, log_probs, anchor)
            if microbatch.supervised:
                assert examples is not None
                terms = next_token(x)
                sums.examples.append(terms)
                return terms.sum * examples.scale, torch.zeros_like(terms.count, dtype=torch.int), None
            terms = objective(x)
            # detached: with CUDA a pipeline's schedule puts other data into the loss that it was given
            sums.reports.append((microbatch, replace(terms, sum=terms.sum.detach())))
            sums.entropies.append((entropy * x.mask).sum())
            sums.tokens += int(batch.tokens.counted[microbatch.source.numpy()].sum())  # the host's own copy
            # the ranks that share out the sequences compute one loss: one of them counts it
            count = terms.count if self._row.rank == 0 else torch.zeros_like(terms.count)
            return terms.sum, count.to(torch.int), None

        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        supervised = examples.microbatches if examples else []
        self._router_losses.weigh(batch, microbatches, supervised, objective)
        self._run(batch, microbatches, loss, forward_only=False, examples=supervised)
        return self._apply(sums, learning_rate)

    def _apply(self, sums: _StepSums, learning_rate: float) -> StepReport:
        optimizer.set_learning_rate(self.optimizer, learning_rate)
        _, norm, _ = self.optimizer.step()
        if self.config.optimizer.qk_clip_threshold:
            clip_qk(self.chunks)
        gradient_norm = float(norm)
        if not np.isfinite(gradient_norm):
            raise NonFiniteLoss(
                f"the gradient norm is {gradient_norm}: the weights of this process are spoilt"
            )
        return (sums if holds_logits() else _StepSums()).report(learning_rate, gradient_norm)

    def _run(
        self,
        batch: RolloutBatch,
        microbatches: batching.Microbatches,
        on_logits: Any,
        *,
        forward_only: bool,
        examples: batching.Microbatches | None = None,
    ) -> None:
        # demonstrations have no recorded routing: routers choose by themselves
        replay = self._replay if batch.tokens.routed_experts is not None else None
        run_schedule(
            self.chunks, batch, microbatches, self._row, on_logits,
            forward_only=forward_only, on_microbatch=self._control.heartbeat.beat, examples=examples,
            replay=replay,
        )  # fmt: skip

    def _token_log_probs(
        self, batch: RolloutBatch, microbatch: PackedMicrobatch, logits: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return microbatch_log_probs(
            microbatch,
            logits,
            # a supervised loss is of the model itself, whatever the policy's temperature is
            temperature=1.0 if microbatch.supervised else batch.temperature,
            chunk_tokens=self.config.actor.log_prob_chunk_tokens,
        )

    def export(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The policy's tensors under their Hugging Face names, whole, on every rank; all iterate together.

        Adapters are merged into what they belong to, in fp32.
        Megatron-Bridge's way, for who needs them so; engines get ShardExport's shards, through buckets.

        Raises ModelError when a tensor of the model folder does not come, or one comes twice.
        """
        waiting = set(self.shapes)
        for name, tensor in self.bridge.export_hf_weights(
            self.chunks, cpu=False, show_progress=False,
            merge_adapter_weights=self.config.actor.lora is not None,
        ):  # fmt: skip
            if name not in waiting:
                raise ModelError(f"tensor {name} was exported twice, or is not in {self.config.model.path}")
            waiting.remove(name)
            yield name, tensor
        if waiting:
            raise ModelError(f"tensor {min(waiting)} was not exported ({len(waiting)} missing in all)")

    def export_adapters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The adapters, by the names of what they belong to in the Hugging Face model; as export()."""
        yield from self.bridge.export_adapter_weights(self.chunks, cpu=False, show_progress=False)

    def wake(self) -> None:
        """Take the device back from the engines."""
        self._residency.wake()

    def release_optimizer(self) -> None:
        """Make room for the engines' weights; the parameters stay, to be exported."""
        self._residency.release_optimizer()

    def wake_parameters(self) -> None:
        """Parameters alone, to be exported while engines are started again."""
        self._residency.wake_parameters()

    def release_parameters(self) -> None:
        """Make room for the engines' KV cache."""
        self._residency.release_parameters()

    def save(
        self,
        folder: Path,
        iteration: int,
        run_state: dict[str, Any],
        write_more: Callable[[Path], None] = lambda folder: None,
    ) -> Path:
        """Begin a checkpoint; it appears when publish_checkpoint finds it complete. See checkpoint.Saver."""
        residency.return_freed_memory()  # saving takes copies of the optimizer's state
        return self._saver.save(folder, iteration, run_state, self.chunks, self.optimizer, write_more)

    def publish_checkpoint(self, *, wait: bool) -> None:
        self._saver.publish(wait=wait)

    def load(self, path: Path) -> None:
        checkpoint.load(path, self.chunks, self.optimizer)

    def reset_optimizer(self) -> None:
        """Forget the moments: the next phase of training starts its own."""
        optimizer.reset_state(self.optimizer)
