"""Write docs/models.md from what tests/actor/test_families.py compares and what the actor refuses.

python -m tools.write_model_table
"""

from __future__ import annotations

from pathlib import Path

from megatron_pmd.actor.families import PROVEN, REFUSED
from megatron_pmd.engine.families import NEEDS_GPUS, NO_ENGINE
from megatron_pmd.planner.shapes import FAMILIES as COUNTED
from tests.actor.conftest import LAYOUTS
from tests.actor.family_models import MODELS, UNMAPPED
from tests.actor.tiny_models import FAMILIES
from tests.engine.test_every_family import OTHERWISE, SERVED
from tools.write_proof_table import proofs, table, words

PAGE = Path(__file__).resolve().parent.parent / "docs" / "models.md"
OF_FOUR_LAYERS = {
    "llama": ("llama", "llama3"),
    "qwen2": ("qwen2",),
    "qwen3": ("qwen3",),
    "qwen3_moe": ("qwen3moe",),
    "deepseek_v3": ("moonlight", "deepseek"),
}
"""The families of tests/actor/test_logits.py and test_layouts.py, by model_type."""

HEAD = """\
# Model families

Written by `make docs` from the lists of `tests/actor/test_families.py`; edit those.

Whether a model can be trained follows from `model_type` in its config.json:

```bash
grep model_type models/Qwen3-30B-A3B-Base/config.json
```

## What works

Of each of these a tiny random model is compared with transformers in float64. Log-probabilities are within
1e-5. The whole gradient of each tensor is within 1e-5 of its norm; that of linear attention's `A_log` and
`dt_bias` within 1e-4. Every tensor comes back bit for bit: from the actor, as it goes to the engines, and
from a conversion there and back. The third column has the layouts that are compared on two or more CPU
processes: tensor and pipeline parallelism of each, and expert parallelism of each mixture, but for what is
refused below. Other layouts of a family are not compared.

In the same cases one step of Muon (`optimizer.name=muon`) equals a float64 computation on whole matrices:
every weight within 1e-6. Of each mixture, log-probabilities, loss and the norm of the gradient equal those of
transformers within 1e-5 when both are given the experts of each token (`actor.experts.replay_routing`);
`kimi_k2` is left out there, as it is computed as `deepseek_v3`. For `llama`, `qwen2`, `qwen3`, `qwen3_moe`
and `deepseek_v3` these two are compared under the layouts of `tests/actor/test_muon.py` and
`tests/actor/test_routing_replay.py`. [LoRA](lora.md) has its own list.
"""
REPLAYS = """\
"Replays": on a CPU this model trains from replayed rollouts alone, for the reason beside it. Where an engine
would die at its start, the run is refused before one starts, with that reason
(`megatron_pmd/engine/families.py`). Nemotron and Qwen3.5 are refused on GPUs, too. "Whole loop": a test of
the suite trains such a model with live engines. "Served in the suite": an engine of its tests, given the
weights, computes transformers' log-probabilities within 1e-4, or its greedy text (`llama`).
[Proofs](proofs.md) names the tests of both. "Served": `tests/engine/test_every_family.py` compares the same
log-probabilities, once of weights that are sent and once of an export of ours that SGLang reads; it is run by
name, outside of the suite.
**On a GPU ran a small `qwen3_moe` and SmolLM2 (`llama`) alone ([gpu.md](gpu.md#results)).**

By hand, SGLang 0.5.23 in fp32 on a CPU with the tiny models, the largest difference of a sampled token's
log-probability from transformers': `gemma2` 1e-6 without a cap on attention scores, 0.16 with a cap of 2,
3e-4 with one of 50; `gemma` 4e-4. Conversions and exports write into config.json what SGLang reads there and
transformers 5 does not write: `hidden_act` of Gemma 2, `full_attention_interval` of Qwen3-Next, and what
transformers' code fixes (`route_norm` and `qk_norm` of Hy3, `scoring_func` of MiniMax-M2).

Transformer Engine has a cap in flash-attn 2 alone, which `constraints/stack.txt` does not bring. Without it,
Gemma 2 gets an attention that holds the scores of whole sequences in memory.

These settings are refused, although the family works:

- DeepSeek-V2 with `topk_method=group_limited_greedy` (the large V2): megatron-core chooses groups otherwise.
- OLMoE and MiniMax-M2 with `layout.tensor` above 1: their norm is over the heads of all ranks.
- gpt-oss with `layout.tensor` above 1 and `layout.expert=1`: megatron-core does not divide experts that have
  biases. Set `layout.expert` above 1.
- Qwen3-Next and Qwen3.5 on CUDA, as long as flash-linear-attention is not installed there:
  megatron-core takes its kernels for linear attention. No constraint pins it, and nobody has run it here. On
  a CPU torch computes the same, slowly.
- gpt-oss and Nemotron with other numbers than the published ones where Megatron-Bridge fixes them: gpt-oss's
  limits of the activation, rotary settings and order of windows; Nemotron's activation, and biases of its
  matrices.
- Qwen3.5-MoE with its experts stacked in one tensor a layer. `save_pretrained` of transformers writes one for
  each expert.
- EXAONE 4.0 with windows, which the 32B model has, or with an output layer beside the embedding:
  Megatron-Bridge leaves both out.
- Gemma 2 and 3 with `layout.context` above 1: Transformer Engine computes no windows over several ranks.
- Gemma 2 and 3 and EXAONE 4.0 with `actor.lora` beside all linear layers: norms stand behind some. Name
  `linear_qkv`, `linear_fc1` or both.
- gpt-oss with `actor.lora` beside its experts: Megatron-Bridge cannot merge them. Name `linear_qkv`,
  `linear_proj` or both.
- gpt-oss with `optimizer.name=muon` and `layout.expert` above 1: megatron-core has no Adam beside Muon for
  biases of experts that ranks share out. Set `layout.expert=1` or `optimizer.name=adam`.
- gpt-oss with `actor.experts.replay_routing` and engines on GPUs. SGLang takes kernels for it that choose the
  experts and record none. Set `rollout.sglang={{"moe_runner_backend": "triton"}}`.
- `rope_parameters` of another type than `default`. Exceptions: `llama3` of Llama and EXAONE 4.0 with Llama's
  own numbers, `yarn` of DeepSeek and Kimi, gpt-oss's own, and `linear` of Gemma 3 on the layers that see all
  tokens.

`plan` counts {counted} alone.
`launch` submits runs of the others, too, and says that it has not compared their memory. Of linear attention
`plan` takes SGLang's share of memory for the states (`mamba_full_memory_ratio`), and not the number of
requests that these states allow.

Layers that predict further tokens (`model.layers.N` behind the last, or `mtp`) are no part of the policy:
they are not trained. Conversions and exports carry them
([conversion.md](conversion.md#layers-that-predict-further-tokens)).
"""
NOT = """\
## What is refused

Megatron-Bridge maps these too. The actor refuses them with a `ModelError`, `models of type … are refused`,
and the reason. Some would load without an error and compute other logits.
"""
NOT_KNOWN = """\
Megatron-Bridge 0.6.2 does not know these. The `ModelError` is `Megatron-Bridge cannot map this model`, with
the architectures that it knows.
"""
OTHERS = """\
Multimodal models are refused too, and so is every family that this page does not name. A family of your own,
which you register with Megatron-Bridge, is not refused: `CONTRIBUTING.md`, "A model family", says how.
"""


def layouts_of(kind: str) -> list[dict[str, int]]:
    """The layouts on which a family is compared, beside one process."""
    if kind not in OF_FOUR_LAYERS:
        return MODELS[kind][2]
    own = OF_FOUR_LAYERS[kind]
    assert set(own) <= FAMILIES.keys()
    return [layout for family, layout in LAYOUTS.values() if family in own]


def on_a_cpu(kind: str) -> str:
    """How a model of the family can be trained there, as far as a test shows it."""
    shown, own = {proof.title: proof.families for proof in proofs()}, {*OF_FOUR_LAYERS.get(kind, ())}
    if shown["whole loop"] & own:
        return "whole loop"
    if shown["SGLang"] & own:
        return "served in the suite"
    if kind in SERVED:
        return "served"
    reasons = OTHERWISE | NEEDS_GPUS | NO_ENGINE
    return f"replays: {reasons[kind]}" if kind in reasons else "replays; engines not tried"


def page() -> str:
    """docs/models.md."""
    compared = {kind: "; ".join(dict.fromkeys(map(words, layouts_of(kind)))) for kind in PROVEN}
    works = [[f"`{kind}`", names, compared[kind], on_a_cpu(kind)] for kind, names in PROVEN.items()]
    parts = [
        HEAD,
        table(["model_type", "models", "layouts compared, beside one process", "on a CPU"], works),
        REPLAYS.format(counted=", ".join(f"`{kind}`" for kind in COUNTED)),
        NOT,
        table(["model_type", "why"], [[f"`{kind}`", reason] for kind, reason in REFUSED.items()]),
        NOT_KNOWN,
        table(["model_type", "models"], [[f"`{kind}`", names] for kind, names in UNMAPPED.items()]),
        OTHERS,
    ]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE)
