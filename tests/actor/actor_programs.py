"""What the tests run on actor ranks: see tests/actor/launch.py."""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.moe.router_replay import RouterReplay
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_pmd.actor import model, settings
from megatron_pmd.actor.actor import Actor, Examples
from megatron_pmd.actor.noise_floor import FloorReport, rounded_anew
from megatron_pmd.actor.parallel import form_groups, holds_logits, initialize
from megatron_pmd.actor.residency import OptimizerStates
from megatron_pmd.algorithm.losses import Constants, loss_of
from megatron_pmd.batch import RolloutBatch, Sample
from megatron_pmd.config import Layout, RunConfig
from megatron_pmd.distributed import Control
from megatron_pmd.errors import PmdError
from megatron_pmd.objectives.pmd import Pmd
from tests.actor import objective_gradients
from tests.actor.tiny_models import OPTIMIZER, STEPS, TEMPERATURE, VOCABULARY, config_for, with_routing

OBJECTIVE = loss_of(Pmd(normaliser="response"), Constants(max_response_tokens=30))
_started: list[tuple[Control, Layout]] = []


def start(layout: Layout) -> Control:
    """Join the ranks, once; form megatron-core's groups anew for another layout of as many ranks."""
    if not _started:
        initialize(layout, seed=0, timeout_seconds=60)
        _started.append((Control(60), layout))
    control, last = _started[0]
    if layout != last:
        parallel_state.destroy_model_parallel()
        form_groups(layout, seed=0, timeout_seconds=60)
        _started[0] = control, layout
    return control


class Trial:
    """An actor with the rollout of its reference."""

    def __init__(self, config: RunConfig) -> None:
        self.control = start(config.layout)
        self.actor = Actor(config, self.control)
        reference = torch.load(Path(config.model.path) / "reference.pt", weights_only=False)
        self.samples, self.anchor = reference.samples, reference.anchor
        self.batch = RolloutBatch.pack(self.samples, TEMPERATURE)

    def step(self, samples: list[int], rate: float = OPTIMIZER.learning_rate) -> tuple[float, int, float]:
        """This rank's loss sum and count, and the gradient norm."""
        return self.step_of(self.actor.microbatches(self.batch, np.array(samples)), rate)

    def step_of(self, microbatches: list[list[int]], rate: float) -> tuple[float, int, float]:
        report = self.actor.update(self.batch, microbatches, self.anchor, OBJECTIVE, rate)
        self.entropy = (report.entropy_sum, report.tokens)
        return report.loss_sum, report.loss_count, report.gradient_norm

    @contextlib.contextmanager
    def gradient_before_clipping(self, result: dict[str, Any]) -> Iterator[None]:
        """Keep the whole gradient of a step made meanwhile: clipping scales it where it lies."""
        step = self.actor.optimizer.step

        def noted() -> Any:
            gradient = objective_gradients.whole_gradient(self.actor)
            result["gradient"] = gradient if self.control.is_driver else {}
            return step()

        self.actor.optimizer.step = noted
        yield
        self.actor.optimizer.step = step

    def save(self, folder: Path, iteration: int = 1) -> Path:
        """A published checkpoint."""
        saved = self.actor.save(folder, iteration, {"iteration": iteration})
        self.actor.publish_checkpoint(wait=True)
        return saved

    def weights(self) -> dict[str, torch.Tensor]:
        """The exported tensors, whole, on rank 0; the export is collective."""
        tensors = {name: tensor.detach().clone() for name, tensor in self.actor.export()}
        return tensors if self.control.is_driver else {}


def train(cases: dict[str, tuple[Path, dict[str, int], Path]]) -> dict[str, Any]:
    """Log-probs, two steps, a checkpoint, a third step, and the third again after loading; by case."""
    return {
        name: train_one(config_for(path, layout), folder) for name, (path, layout, folder) in cases.items()
    }


def random_numbers() -> list[float]:
    """The next of every generator that a run may draw from."""
    with get_cuda_rng_tracker().fork():
        forked = float(torch.rand(()))
    return [random.random(), float(np.random.random()), float(torch.rand(())), forked]


def train_one(config: RunConfig, folder: Path) -> dict[str, Any]:
    trial = Trial(config)
    microbatches = trial.actor.microbatches(trial.batch, np.arange(16))
    packings = [microbatches]
    if config.layout.ranks == 1:
        packings += [[list(range(16))], [[i] for i in range(16)]]
    result: dict[str, Any] = {
        "holds_logits": holds_logits(),
        "microbatches": microbatches,
        # plain values: a report's own class would make the reader import megatron-core
        "anchors": [
            SimpleNamespace(**vars(trial.actor.log_probs(trial.batch, packing))) for packing in packings
        ],
        "loaded_weights": trial.weights(),
    }
    with trial.gradient_before_clipping(result):
        first = trial.step(STEPS[0])
    result["entropy"] = trial.entropy
    result["steps"] = [first, trial.step(STEPS[1])]
    result["weights"] = trial.weights()
    # the third step runs, and changes every tensor, while the checkpoint is being written
    result["checkpoint"] = trial.actor.save(folder, 2, {"iteration": 2})
    result["drawn"] = random_numbers()
    result["third"] = [trial.step(STEPS[2]), trial.weights()]
    trial.actor.publish_checkpoint(wait=True)
    trial.actor.load(result["checkpoint"])
    result["drawn_resumed"] = random_numbers()
    result["third_resumed"] = [trial.step(STEPS[2]), trial.weights()]
    return result


def resume(cases: list[tuple[Path, Path, dict[str, int]]]) -> list[Any]:
    """(model, checkpoint, layout to load under): the third step after loading, and the weights it gives."""
    results = []
    for path, saved, layout in cases:
        trial = Trial(config_for(path, layout))
        trial.actor.load(saved)
        results.append((trial.step(STEPS[2]), trial.weights()))
    return results


def logits(path: Path) -> dict[str, Any]:
    """What the schedule hands on of a bf16 model's logits, and the widest tensors of an update, by dtype."""
    trial = Trial(config_for(path, precision="bf16"))
    widest: dict[str, int] = {}
    samples = list(range(16))

    class Widest(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **kwargs or {})
            if torch.is_tensor(result) and result.dim() > 1 and result.size(-1) == VOCABULARY:
                kind = str(result.dtype)
                widest[kind] = max(widest.get(kind, 0), result.numel() // VOCABULARY)
            return result

    with Widest():
        trial.step_of([samples], 0.0)
    few = [samples]
    once = trial.actor.log_probs(trial.batch, few)
    with rounded_anew(trial.actor.chunks):
        again = trial.actor.log_probs(trial.batch, few)
    repeated = trial.actor.log_probs(trial.batch, few)
    floor, none = (
        FloorReport.of(trial.batch, few, once.log_probs, other.log_probs) for other in (again, repeated)
    )
    return {
        "floor": vars(floor), "repeated": vars(none), "log_probs": once.log_probs,
        "rows": widest, "responses": int(trial.batch.samples.response_lengths[samples].sum()),
    }  # fmt: skip


def gradients(paths: list[Path]) -> dict[str, dict[str, tuple[float, torch.Tensor]]]:
    """By model name, see gradients_of."""
    return {path.name: gradients_of(path) for path in paths}


def gradients_of(path: Path) -> dict[str, tuple[float, torch.Tensor]]:
    """Loss and whole gradient of the first step under several packings; the learning rate is 0."""
    trial = Trial(config_for(path))
    shuffled = np.random.default_rng(3).permutation(16).tolist()
    packings: dict[str, list[list[int]]] = {
        "one micro-batch": [list(range(16))],
        "the actor's own": trial.actor.microbatches(trial.batch, np.arange(16)),
        "one sample each": [[i] for i in range(16)],
        "one sample each, backwards": [[i] for i in range(15, -1, -1)],
        "any order, uneven": [shuffled[:1], shuffled[1:12], shuffled[12:]],
        "with an empty micro-batch": [shuffled[:9], [], shuffled[9:]],
    }

    def measure(trial: Trial, packing: list[list[int]]) -> tuple[float, torch.Tensor]:
        loss, count, _ = trial.step_of(packing, 0.0)
        assert count == 16
        return loss / count, torch.cat(
            [p.main_grad.flatten().clone() for p in trial.actor.chunks[0].parameters()]
        )

    results = {name: measure(trial, packing) for name, packing in packings.items()}
    modules = ["core_attn", "moe"] if "moe" in path.name else ["core_attn", "mlp"]
    for name, actor in {
        "recomputed layers": {"recompute": "full"},
        "two recomputed layers": {"recompute": "full", "recompute_layers": 2},
        "recomputed modules": {"recompute": "selective", "recompute_modules": modules},
    }.items():
        recomputing = Trial(config_for(path, actor=actor))
        results[name] = measure(recomputing, packings["the actor's own"])
    return results


def objectives(path: Path, layout: dict[str, int], teacher: Path) -> dict[str, Any]:
    """See objective_gradients.all_gradients; unclipped. On one rank also its `distances` to the teacher."""
    config = config_for(path, layout)
    unclipped = config.optimizer.model_copy(update={"gradient_clip": 1e9})
    trial = Trial(config.model_copy(update={"optimizer": unclipped}))
    samples = [
        replace(sample, teacher_log_probs=other.engine_log_probs)
        for sample, other in zip(_samples(path), _samples(teacher), strict=True)
    ]
    trial.batch = RolloutBatch.pack(samples, TEMPERATURE)
    results: dict[str, Any] = objective_gradients.all_gradients(trial)
    if config.layout.ranks == 1:
        results["distances"] = objective_gradients.distances(trial)
    return results


def _samples(path: Path) -> list[Sample]:
    """Those of tiny_models.rollout, with the model's own log-probabilities."""
    return torch.load(path / "reference.pt", weights_only=False).samples


def resets(configs: dict[str, RunConfig]) -> dict[str, Any]:
    """See resets_of."""
    return {name: resets_of(config) for name, config in configs.items()}


def resets_of(config: RunConfig) -> dict[str, Any]:
    """The second step after the first one's moments were forgotten, and as the first step of a new
    optimizer."""
    trial = Trial(config)
    trial.step(STEPS[0])
    moved = [p.detach().clone() for p in trial.actor.chunks[0].parameters()]
    trial.actor.reset_optimizer()
    after_reset = [trial.step(STEPS[1]), trial.weights()]
    fresh = Trial(config)
    for parameter, weight in zip(fresh.actor.chunks[0].parameters(), moved, strict=True):
        parameter.data.copy_(weight)
    return {"after reset": after_reset, "fresh": [fresh.step(STEPS[1]), fresh.weights()]}


def off_and_on(configs: dict[str, RunConfig]) -> dict[str, Any]:
    """By case: three steps between which the optimizer leaves and comes back, and three alone."""
    results = {}
    for name, config in configs.items():
        trial, alone = (Trial(config) for _ in range(2))
        states, cpu = OptimizerStates(trial.actor.chunks, trial.actor.optimizer), torch.device("cpu")
        seen: dict[str, Any] = {"addresses": [], "steps": [], "alone": [alone.step(s) for s in STEPS]}
        for samples in STEPS:
            seen["steps"].append(trial.step(samples))
            states.leave(cpu)
            seen["addresses"].append([host.data_ptr() for host in states._host.values()])
            states.come_back(cpu)
            for host in states._host.values():
                host.fill_(torch.nan)  # whoever still uses the copy shows
        parameters = list(trial.actor.chunks[0].parameters())
        seen["kinds"] = len(states._host) / len(parameters)
        seen["equal"] = all(
            torch.equal(p, q) for p, q in zip(parameters, alone.actor.chunks[0].parameters(), strict=True)
        )
        results[name] = seen
    return results


def replayed(cases: dict[str, tuple[Path, dict[str, int], dict[str, Any]]]) -> dict[str, Any]:
    """Log-probs, the first step, and held experts, with with_routing's; by case: (model, layout, actor)."""
    results = {}
    for name, (path, layout, actor) in cases.items():
        trial = Trial(config_for(path, layout, actor={"experts": {"replay_routing": True}, **actor}))
        trial.batch = RolloutBatch.pack(with_routing(trial.samples), TEMPERATURE)
        with _held_experts() as held:
            report = trial.actor.log_probs(trial.batch, trial.actor.microbatches(trial.batch, np.arange(16)))
        own = report.log_probs if holds_logits() else torch.full_like(report.log_probs, torch.nan)
        results[name] = own, trial.step(STEPS[0]), max(held)
    return results


@contextlib.contextmanager
def _held_experts() -> Iterator[list[int]]:
    """Of how many micro-batches a router holds the experts, each time that it is given those of one."""
    held, given = list[int](), RouterReplay.set_target_indices

    def count(router: RouterReplay, experts: torch.Tensor) -> None:
        given(router, experts)
        held.append(len(router.replay_backward_list))

    with mock.patch.object(RouterReplay, "set_target_indices", count):
        yield held


def expert_bias(path: Path, folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The routers' biases as loaded, after a step that moves nothing else, and after loading a checkpoint."""

    def biases(trial: Trial) -> dict[str, torch.Tensor]:
        return {name: bias for name, bias in trial.weights().items() if "correction_bias" in name}

    trial = Trial(config_for(path, actor={"experts": {"bias_update_rate": 0.01}}))
    result = {"loaded": biases(trial)}
    trial.step(STEPS[0], rate=0.0)
    result["updated"] = biases(trial)
    saved = trial.save(folder)
    fresh = Trial(config_for(path))
    fresh.actor.load(saved)
    result["resumed"] = biases(fresh)
    fresh.step(STEPS[0], rate=0.0)
    result["rate 0"] = biases(fresh)
    result["bf16"] = biases(Trial(config_for(path, precision="bf16")))
    return result


def message_of(action: Any) -> tuple[str, str]:
    """Type and text of what the action raises; ("", "") if nothing."""
    try:
        action()
    except PmdError as error:
        return type(error).__name__, str(error)
    except Exception as error:
        return f"not a PmdError: {type(error).__name__}", str(error)
    return "", ""


def build_errors(cases: dict[str, tuple[Path, dict[str, Any]]]) -> dict[str, tuple[str, str]]:
    """(model folder, changes to its configuration) -> the error of building an actor from it."""
    start(Layout())

    def attempt(path: Path, changes: dict[str, Any]) -> None:
        config = config_for(path, **changes)
        bridge = model.load_bridge(path)
        if config.layout.ranks == 1:
            model.build(bridge, config)
        else:  # its check of the layout comes before anything that needs the ranks
            model.provider_for(bridge, config)

    return {name: message_of(functools.partial(attempt, *case)) for name, case in cases.items()}


def overlapped(path: Path, layouts: list[dict[str, int]]) -> list[list[Any]]:
    """By layout: buckets, three steps and their weights, once with gradients that are reduced during the
    backward pass, in many buckets, as on GPUs, and once without."""
    fields, results = settings.data_parallel_fields, []
    for layout in layouts:
        both = []
        for overlap in (True, False):
            own = dict(overlap_grad_reduce=overlap, bucket_size=10_000)
            settings.data_parallel_fields = lambda config, own=own: fields(config) | own  # type: ignore[misc]
            trial = Trial(config_for(path, layout))
            buckets = sum(len(buffer.buckets) for chunk in trial.actor.chunks for buffer in chunk.buffers)
            both.append((buckets, [trial.step(samples) for samples in STEPS], trial.weights()))
        results.append(both)
    settings.data_parallel_fields = fields
    return results


def numbers_asked_for(path: Path) -> dict[str, list[int]]:
    """How often each micro-batch's loss, and its log-probabilities, ask a tensor for its number."""
    trial = Trial(config_for(path))
    run, asked = trial.actor._run, {"update": [], "log_probs": []}  # type: ignore[var-annotated]

    class Asked(TorchDispatchMode):
        times = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.times += function.overloadpacket is torch.ops.aten._local_scalar_dense
            return function(*args, **kwargs or {})

    def watched(batch: Any, microbatches: Any, on_logits: Any, *, forward_only: bool, **options: Any) -> None:
        def counted(*arguments: Any) -> Any:
            with Asked() as mode:
                result = on_logits(*arguments)
            asked["log_probs" if forward_only else "update"].append(mode.times)
            return result

        run(batch, microbatches, counted, forward_only=forward_only, **options)

    trial.actor._run = watched  # type: ignore[method-assign]
    microbatches = trial.actor.microbatches(trial.batch, np.arange(16))
    trial.actor.log_probs(trial.batch, microbatches)
    # half of them as supervised examples beside the responses
    beside = Examples(microbatches[2:], 1.0)
    trial.actor.update(trial.batch, microbatches[:2], trial.anchor, OBJECTIVE, 0.0, beside)
    return asked
