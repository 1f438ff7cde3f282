"""What the actor must compute, by transformers, autograd and an AdamW written out here, in float64.

transformers keeps its norms, rotary angles and router softmax in fp32 whatever the model's type is: the
reference is good to about 1e-6. It must not run in a process with the stand-ins: with them transformers
initialises rotary buffers wrongly.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megatron_pmd.batch import Sample
from tests.actor.tiny_models import OPTIMIZER, STEPS, TEMPERATURE, rollout, with_routing, write_model


@dataclass
class Step:
    loss: float
    """Mean over the step's sequences."""
    gradient_norm: float
    """Before clipping."""
    gradient: dict[str, torch.Tensor]
    """Before clipping, by Hugging Face name, as files hold the weights."""
    weights: dict[str, torch.Tensor]
    """After the step, by Hugging Face name, as files hold them."""
    entropy: float
    """Before the step: mean over the counted tokens of its responses, nats."""


@dataclass
class Reference:
    samples: list[Sample]
    """With the model's own log-probs of the response tokens as engine_log_probs."""
    entropy_sum: float
    """Over all counted response tokens, nats."""
    anchor: torch.Tensor
    """float32 [tokens of the rollout], NaN at prompt tokens: the log-probs, moved at random."""
    steps: list[Step]


def compute(model_folder: Path, steps: list[list[int]] = STEPS) -> Reference:
    # two threads on tensors this small wait for each other: minutes on a busy machine
    torch.set_num_threads(1)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        model_folder, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )
    samples = rollout()
    entropy_sum = 0.0
    for sample in samples:
        with torch.no_grad():
            distribution = log_softmax(model, sample)
        entropy_sum -= float((distribution.exp() * distribution)[_counted(sample)].sum())
        sample.engine_log_probs = given(distribution, sample).numpy()
    noise = torch.Generator().manual_seed(1)
    # an anchor that differs from the policy: the squared term of the loss counts from the first step on
    anchors = [
        (
            torch.tensor(s.engine_log_probs) + 0.3 * torch.randn(len(s.response_tokens), generator=noise)
        ).float()
        for s in samples
    ]
    optimizer = AdamW(model)
    taken = [_step(model, optimizer, samples, anchors, indices) for indices in steps]
    prompts = [torch.full((len(s.prompt_tokens),), torch.nan) for s in samples]
    anchor = torch.cat([part for pair in zip(prompts, anchors, strict=True) for part in pair])
    return Reference(samples, entropy_sum, anchor, taken)


def write_with_references(root: Path, models: Mapping[str, tuple[str, dict[str, Any]]]) -> Path:
    """A folder of tiny models in root, each with reference.pt; who comes second finds it, or waits for it.

    models: by name, the family and what differs from its tiny model.
    """
    folder, partial = root / "models", root / "models.partial"
    with (root / "models.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            for name, (family, changes) in models.items():
                write_model(partial / name, family, **changes)
                torch.save(compute(partial / name), partial / name / "reference.pt")
            partial.rename(folder)
    return folder


def log_softmax(model: Any, sample: Sample) -> torch.Tensor:
    """[response tokens, vocabulary] log π at the sampling temperature."""
    tokens = torch.from_numpy(sample.tokens)[None].long()
    logits = model(tokens).logits[0, len(sample.prompt_tokens) - 1 : -1]
    return (logits / TEMPERATURE).log_softmax(-1)


def given(distribution: torch.Tensor, sample: Sample) -> torch.Tensor:
    return distribution.gather(1, torch.from_numpy(sample.response_tokens).long()[:, None])[:, 0]


@torch.no_grad()
def log_probs_of(model: Any, samples: list[Sample]) -> torch.Tensor:
    """float64 [tokens of the rollout], NaN at prompt tokens."""
    parts = []
    for sample in samples:
        nothing = torch.full((len(sample.prompt_tokens),), torch.nan, dtype=torch.float64)
        parts += [nothing, given(log_softmax(model, sample), sample)]
    return torch.cat(parts)


def anchors_of(expected: Reference) -> list[torch.Tensor]:
    """Of each sample, [response tokens]."""
    anchors = expected.anchor.split([len(sample.tokens) for sample in expected.samples])
    return [
        anchor[len(sample.prompt_tokens) :] for anchor, sample in zip(anchors, expected.samples, strict=True)
    ]


def _counted(sample: Sample) -> torch.Tensor:
    """[response tokens] bool."""
    return torch.tensor([segment.counted for segment in sample.segments for _ in range(segment.tokens)])


def _step(
    model: Any, optimizer: AdamW, samples: list[Sample], anchors: list[torch.Tensor], indices: list[int]
) -> Step:
    """The gradient of (1/N) Σ (τ/2)(s − A/τ)² / |y| with s = Σ log π_θ − log π_t, and one step along it.

    Σ and |y| are over the tokens that count.
    """
    from transformers.core_model_loading import revert_weight_conversion

    model.zero_grad()
    loss, entropy = loss_of(model, samples, anchors, indices)
    loss.backward()
    gradient = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norm = optimizer.step()
    before, after = (
        {name: tensor.clone() for name, tensor in revert_weight_conversion(model, tensors).items()}
        for tensors in (gradient, model.state_dict())
    )
    return Step(float(loss.detach()), norm, before, after, entropy)


def loss_of(
    model: Any, samples: list[Sample], anchors: list[torch.Tensor], indices: list[int]
) -> tuple[torch.Tensor, float]:
    """The loss above, and the mean entropy of the tokens that count, nats."""
    losses, entropies = [], []
    for i in indices:
        counted = _counted(samples[i])
        distribution = log_softmax(model, samples[i])
        entropies.append(-(distribution.exp() * distribution).sum(-1)[counted].detach())
        log_probs = given(distribution, samples[i])
        s = (log_probs - anchors[i].double())[counted].sum()
        tau = samples[i].tau
        losses.append(tau / 2 * (s - samples[i].advantage / tau) ** 2 / counted.sum())
    return torch.stack(losses).mean(), float(torch.cat(entropies).mean())


@dataclass
class Replayed:
    log_probs: torch.Tensor
    """float64 [tokens of the rollout], NaN at prompt tokens."""
    loss: float
    """Of the first step: mean over its sequences."""
    gradient_norm: float


def replay(model_folder: Path, expected: Reference) -> Replayed:
    """What the model computes of the rollout with with_routing's experts."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        model_folder, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )
    layers = model.model.layers
    samples = with_routing(expected.samples, layers=len(layers))
    recorded: dict[tuple[int, ...], tuple[torch.Tensor, ...]] = {}
    chosen: dict[int, torch.Tensor] = {}
    for sample in samples:
        assert sample.routed_experts is not None
        experts = torch.from_numpy(sample.routed_experts.astype("int64")).unflatten(1, (len(layers), -1))
        experts = torch.cat([experts, experts[-1:]])  # the last token has none: nobody reads its logits
        recorded[tuple(sample.tokens)] = experts.unbind(1)
    model.register_forward_pre_hook(
        lambda _, arguments: chosen.update(enumerate(recorded[tuple(arguments[0][0].tolist())]))
    )
    for number, layer in enumerate(layers):
        if router_of(layer.mlp):
            force(layer.mlp, partial(chosen.__getitem__, number))
    loss, _ = loss_of(model, samples, anchors_of(expected), STEPS[0])
    loss.backward()
    norm = sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None) ** 0.5
    return Replayed(log_probs_of(model, samples), float(loss.detach()), norm)


def router_of(mlp: Any) -> Any:
    """None: a layer without experts."""
    return getattr(mlp, "gate", getattr(mlp, "router", None))


def force(mlp: Any, chosen: Callable[[], torch.Tensor]) -> None:
    """Have a layer's router take these experts, [tokens, top-k], with weights of its own."""
    router = router_of(mlp)
    forward = router.forward

    def forced(*arguments: torch.Tensor) -> Any:
        with _Chosen(router.weight.shape[0], chosen()):
            return forward(*arguments)

    router.forward = forced


class _Chosen(TorchFunctionMode):
    """Where a router asks for the best of all its experts, by whatever score, it is told these."""

    def __init__(self, experts: int, chosen: torch.Tensor) -> None:
        super().__init__()
        self.experts, self.chosen = experts, chosen

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        of_all = function is torch.topk and args[0].shape == (len(self.chosen), self.experts)
        if of_all and (args[1:] or (kwargs["k"],))[0] == self.chosen.shape[1]:
            return torch.return_types.topk((args[0].gather(1, self.chosen), self.chosen))
        return function(*args, **kwargs or {})


class AdamW:
    """Decoupled weight decay (arXiv 1711.05101) on matrices only, after clipping the global gradient norm."""

    def __init__(self, model: Any) -> None:
        self.parameters = list(model.parameters())
        self.first = [torch.zeros_like(p) for p in self.parameters]
        self.second = [torch.zeros_like(p) for p in self.parameters]
        self.count = 0

    @torch.no_grad()
    def step(self) -> float:
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters]
        norm = float(sum(g.square().sum() for g in gradients) ** 0.5)
        scale = min(1.0, OPTIMIZER.gradient_clip / norm)
        self.count += 1
        b1, b2, rate = OPTIMIZER.beta1, OPTIMIZER.beta2, OPTIMIZER.learning_rate
        for p, g, m, v in zip(self.parameters, gradients, self.first, self.second, strict=True):
            m.copy_(b1 * m + (1 - b1) * g * scale)
            v.copy_(b2 * v + (1 - b2) * (g * scale) ** 2)
            corrected, variance = m / (1 - b1**self.count), v / (1 - b2**self.count)
            decay = OPTIMIZER.weight_decay * p if p.ndim > 1 else 0.0
            p.sub_(rate * (corrected / (variance.sqrt() + OPTIMIZER.epsilon) + decay))
        return norm


def as_in_files(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One tensor an expert; transformers 5 holds a layer's experts in one, gate above up."""
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith("experts.gate_up_proj"):
            for i, expert in enumerate(tensor):
                prefix = name.replace("gate_up_proj", str(i))
                gate, up = expert.chunk(2)
                weights |= {
                    f"{prefix}.gate_proj.weight": gate.clone(),
                    f"{prefix}.up_proj.weight": up.clone(),
                }
        elif name.endswith("experts.down_proj"):
            for i, expert in enumerate(tensor):
                weights[f"{name.replace('down_proj', str(i))}.down_proj.weight"] = expert.clone()
        else:
            weights[name] = tensor.clone()
    return weights
