"""Every text family that Megatron-Bridge maps and transformers knows: computed as there, or refused."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as OF_IMAGES

from megatron_pmd.actor import families
from megatron_pmd.config import Layout
from megatron_pmd.convert import precision
from megatron_pmd.convert.untrained import untrained
from megatron_pmd.hugging_face import TensorFiles, bytes_of
from megatron_pmd.planner.shapes import FAMILIES as COUNTED
from megatron_pmd.planner.shapes import shape_of
from megatron_pmd.planner.sharding import stages
from tests.actor.family_models import (
    MODELS,
    UNMAPPED,
    write_model_of,
    write_mxfp4,
    write_quantized,
    write_refused,
    write_rope,
)
from tests.actor.further_tokens import FILE, FURTHER_TOKENS, NAMED_MTP, add_layer
from tests.actor.launch import launch
from tests.actor.muon_definition import Definition, difference, matrices_of
from tests.actor.reference import Reference, replay
from tests.actor.tiny_models import MUON, OPTIMIZER, WEIGHT_TOLERANCE, config_for, write_model
from tools.write_proof_table import words

pytestmark = pytest.mark.slow

CASES = {
    f"{kind}, {words(layout)}": (kind, layout)
    for kind, (_, _, layouts) in MODELS.items()
    for layout in [{}, *layouts]
}
MIXTURES = {kind for kind, (_, own, _) in MODELS.items() if "num_experts_per_tok" in own} - {"kimi_k2"}
WINDOWS_BEHIND_NORMS = sorted(families.POST_NORMS - {"exaone4"})
ROUTERS_BIAS = re.compile(r"correction_bias|expert_bias")
"""It is no parameter."""


def program(name: str, ranks: int = 1, **arguments: Any) -> list[Any]:
    return launch(name, ranks=ranks, module="tests.actor.family_programs", **arguments)


@pytest.fixture(scope="module")
def results(of_families: Path) -> dict[str, list[dict[str, Any]]]:
    """By case, every rank's results."""
    found: dict[str, list[dict[str, Any]]] = {}
    for ranks in (1, 2):
        own = {name: case for name, case in CASES.items() if Layout(**case[1]).ranks == ranks}
        of_ranks = program("families", ranks, cases={n: (of_families / k, v) for n, (k, v) in own.items()})
        found |= {name: [rank[name] for rank in of_ranks] for name in own}
    return found


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def reference(case: str, of_families: Path) -> Reference:
    return torch.load(of_families / CASES[case][0] / "reference.pt", weights_only=False)


def whole_log_probs(ranks: list[dict[str, Any]], name: str) -> torch.Tensor:
    """float64 [tokens of the rollout], NaN at prompt tokens, of what several ranks have."""
    whole = torch.full_like(ranks[0][name], torch.nan)
    for rank in ranks:
        own = ~rank[name].isnan()
        if rank["holds_logits"]:
            whole[own] = rank[name][own]
    return whole.double()


def gradient_of(step: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Megatron-Bridge adds 1 to these norms on the way out: megatron-core holds them around zero."""
    return {
        name: tensor - float(name.endswith("linear_attn.norm.weight"))
        for name, tensor in step["gradient"].items()
    }


def test_log_probs_are_those_of_transformers(case, results, reference):
    parts = [[torch.nan] * len(s.prompt_tokens) + s.engine_log_probs.tolist() for s in reference.samples]
    expected = torch.tensor([value for part in parts for value in part]).double()
    found = whole_log_probs(results[case], "log_probs")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5, equal_nan=True)


def test_loss_and_whole_gradient_of_a_step_are_those_of_autograd_in_float64(case, results, reference):
    found, (expected,) = results[case], reference.steps
    loss, count = (sum(rank["step"][i] for rank in found) for i in (0, 1))
    assert loss / count == pytest.approx(expected.loss, rel=1e-5)
    gradient = gradient_of(found[0])
    assert expected.gradient.keys() <= gradient.keys()
    errors = {
        tensor: float((gradient[tensor].double() - own).norm() / own.norm())
        for tensor, own in expected.gradient.items()
    }
    # of these two the terms cancel, and transformers computes the rule in fp32 whatever the model's type is
    bounds = {name: 1e-4 if name.endswith((".A_log", ".dt_bias")) else 1e-5 for name in errors}
    assert all(error < bounds[name] for name, error in errors.items()), errors


def refuses_muon(kind: str, layout: dict[str, int]) -> bool:
    return kind in families.BIASED_EXPERTS and layout.get("expert", 1) > 1


def test_a_step_of_muon_is_that_of_newton_schulz_in_float64_on_whole_matrices(case, of_families, results):
    """The queries, keys, values, gates, and what else shares a tensor or a parameter, each alone."""
    (kind, layout), found = CASES[case], results[case][0]
    if refuses_muon(kind, layout):
        assert "of the experts is no matrix" in found["muon"]
        return
    before = {name: w for name, w in found["exported"].items() if not ROUTERS_BIAS.search(name)}
    step, (*_, norm) = found["muon"], found["second_step"]
    definition = Definition(before, matrices_of(of_families / kind))
    expected = definition.step(before, gradient_of(step), norm, OPTIMIZER.learning_rate)
    errors = difference(expected, {name: step["weights"][name] for name in before})
    assert max(errors.values()) < WEIGHT_TOLERANCE, errors


WITHOUT_REPLICAS = [
    case
    for case, (kind, layout) in CASES.items()
    if kind in COUNTED and not layout.keys() & {"data", "context"} and not refuses_muon(kind, layout)
]
"""Ranks that share out a row hold the same weights."""


@pytest.mark.parametrize("case", WITHOUT_REPLICAS)
def test_a_plan_counts_the_states_of_muon_and_of_the_adam_beside_it(case, of_families, results):
    kind, layout = CASES[case]
    config = config_for(of_families / kind, layout, optimizer=MUON)
    planned = stages(shape_of(config.model.path), config)
    each = len(results[case]) // len(planned)
    for stage in planned:
        own = results[case][stage.number * each :][:each]
        assert [rank["muon"]["states"] for rank in own] == each * [stage.optimizer_bytes]


@pytest.fixture(scope="module")
def replayed(of_families: Path) -> Any:
    """By kind."""
    return functools.cache(
        lambda kind: replay(
            of_families / kind, torch.load(of_families / kind / "reference.pt", weights_only=False)
        )
    )


# kimi_k2 is the deepseek_v3 of tests/actor/test_routing_replay.py under another name
@pytest.mark.parametrize("case", [case for case, (kind, _) in CASES.items() if kind in MIXTURES])
def test_with_replayed_experts_log_probs_and_gradient_are_those_of_transformers(case, replayed, results):
    found, expected = results[case], replayed(CASES[case][0])
    log_probs = whole_log_probs(found, "replayed")
    torch.testing.assert_close(log_probs, expected.log_probs, rtol=0, atol=1e-5, equal_nan=True)
    loss, count = (sum(rank["second_step"][i] for rank in found) for i in (0, 1))
    assert loss / count == pytest.approx(expected.loss, rel=1e-5)
    assert found[0]["second_step"][2] == pytest.approx(expected.gradient_norm, rel=1e-5)


def test_a_folder_comes_back_byte_for_byte(case, of_families, results):
    held = load_file(of_families / CASES[case][0] / "model.safetensors")
    exported = results[case][0]["exported"]
    assert exported.keys() == held.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in held.items())


@pytest.fixture(scope="module")
def mxfp4(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """gpt-oss as it is published, in MXFP4, and what its experts' matrices stand for.

    As there, the down-projections are square: their shape does not tell which side is the input.
    """
    root = tmp_path_factory.mktemp("mxfp4")
    write_model_of(root / "plain", "gpt_oss", intermediate_size=64)
    return root / "mxfp4", write_mxfp4(root / "plain", root / "mxfp4")


@pytest.fixture(scope="module")
def converted(of_families: Path, mxfp4: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every folder's model as a checkpoint and as a folder again, in files of several parameters."""
    out = tmp_path_factory.mktemp("converted")
    cases = [
        (folder, out / folder.name, None) for folder in (*(of_families / kind for kind in MODELS), mxfp4[0])
    ]
    launch("round_trips", module="tests.convert.conversion_programs", cases=cases, verified=([], []))
    return out


@pytest.mark.parametrize("kind", MODELS)
def test_a_conversion_there_and_back_keeps_every_byte(kind, of_families, converted):
    before, after = (TensorFiles(folder) for folder in (of_families / kind, converted / kind / "hf"))
    assert before.tensors.keys() == after.tensors.keys()
    assert all(bytes_of(before.get(name)) == bytes_of(after.get(name)) for name in before.tensors)


@pytest.mark.parametrize("kind", FURTHER_TOKENS)
def test_layers_that_predict_further_tokens_are_carried_and_no_part_of_the_policy(
    kind, of_families, results, converted
):
    """Byte for byte, as all of a folder's tensors; of `mtp`, transformers leaves out the same."""
    further = load_file(of_families / kind / FILE).keys()
    assert not further & results[f"{kind}, one process"][0]["exported"].keys()
    for folder in ("megatron", "hf"):
        manifest = json.loads((converted / kind / folder / "conversion.json").read_text())
        assert manifest["untrained"].keys() == further
    if kind in NAMED_MTP:
        patterns = getattr(transformers, CLASSES[kind])._keys_to_ignore_on_load_unexpected
        assert all(any(re.search(pattern, name) for pattern in patterns) for name in further)


GATHERED = {
    "glm4_moe_lite": r".*",
    "minimax_m2": r"[qk]_norm\.weight$",
    "qwen3_next": r"linear_attn|self_attn\.[qkv]_proj",
    "qwen3_5_text": r"linear_attn|self_attn\.[qkv]_proj",
    "qwen3_5_moe_text": r"linear_attn|self_attn\.[qkv]_proj",
}
"""The tensors that Megatron-Bridge alone can make, by family: all ranks gather them."""


@pytest.mark.parametrize("kind", MODELS)
def test_every_rank_knows_which_regions_of_the_tensors_it_holds(kind, of_families, results):
    """They go to the engines without a gather of the whole tensor; GATHERED has the exceptions."""
    held = load_file(of_families / kind / "model.safetensors")
    for case in (case for case, (other, _) in CASES.items() if other == kind):
        seen = {name: torch.zeros_like(tensor, dtype=torch.bool) for name, tensor in held.items()}
        for rank in results[case]:
            for name in rank["irregular"]:
                assert kind in GATHERED and re.search(GATHERED[kind], name), name
                seen[name].fill_(True)
            for region, tensor in rank["shards"].items():
                own = held[region.name].narrow(region.dim, region.start, region.length)
                assert torch.equal(tensor.reshape(own.shape), own), region
                seen[region.name].narrow(region.dim, region.start, region.length).fill_(True)
        assert all(whole.all() for whole in seen.values())


OTHERS: dict[str, dict[str, Any]] = {
    "deepseek_v2, groups": dict(topk_method="group_limited_greedy"),
    "gpt_oss, layers": dict(layer_types=["full_attention"] * 36),
    "nemotron, biases": dict(attention_bias=True),
    "exaone4, windows": dict(tie_word_embeddings=True),
    "gemma3_text, capped": dict(final_logit_softcapping=30.0),
}
"""Configurations of families that work, which are refused."""


@pytest.fixture(scope="module")
def quantized(
    of_families: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, dict[str, np.ndarray]]]:
    """By model_type: a model as it is published, in FP8, and what its matrices stand for."""
    root = tmp_path_factory.mktemp("quantized")
    widths = {name: MODELS["kimi_k2"][1][name] for name in ("intermediate_size", "moe_intermediate_size")}
    write_model(root / "plain", "deepseek", num_hidden_layers=2, **widths)
    add_layer(root / "plain", "deepseek")
    sources = {"deepseek_v3": root / "plain", "kimi_k2": of_families / "kimi_k2"}
    return {kind: (root / kind, write_quantized(source, root / kind)) for kind, source in sources.items()}


@pytest.fixture(scope="module")
def refused(
    of_families: Path, quantized: Any, mxfp4: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("refused")
    for kind in (*families.REFUSED, *UNMAPPED, "qwen2_5_vl"):
        write_refused(root / kind, kind, CLASSES.get(kind) or OF_IMAGES[kind])
    for name, changes in OTHERS.items():
        kind = name.partition(",")[0]
        write_refused(root / name, kind, CLASSES[kind], **changes)
    stacked = root / "qwen3_5_moe_text, stacked"
    write_refused(stacked, "qwen3_5_moe_text", CLASSES["qwen3_5_moe_text"])
    save_file({"model.layers.0.mlp.experts.down_proj": torch.zeros(1)}, stacked / "model.safetensors")
    whole = families.NORMS_OF_ALL_HEADS | families.BIASED_EXPERTS
    layouts = {f"{kind}, tensor=2": (of_families / kind, dict(tensor=2)) for kind in whole}
    layouts["qwen3_next, four ways"] = (of_families / "qwen3_next", dict(tensor=2, context=2, expert=2))
    layouts |= {f"{kind}, context=2": (of_families / kind, dict(context=2)) for kind in WINDOWS_BEHIND_NORMS}
    named = {folder.name: folder for folder in root.iterdir()}
    unread = {"gpt_oss, rope": write_rope(of_families / "gpt_oss", root / "rope", factor=16.0)}
    read = {kind: folder for kind, (folder, _) in quantized.items()} | {"gpt_oss": mxfp4[0]}
    return program("refusals", folders=named, layouts=layouts, quantized=read, unread=unread)[0]


@pytest.mark.parametrize("kind", UNMAPPED)
def test_of_a_family_that_megatron_bridge_does_not_know_the_error_says_so(kind, refused):
    """When this fails for one, Megatron-Bridge maps it, and it belongs to another list."""
    error, message = refused["said"][kind]
    assert error == "ModelError" and "Megatron-Bridge cannot map this model" in message
    assert f"'{CLASSES[kind]}' is not yet supported" in message
    assert CLASSES[kind] not in refused["known"]


@pytest.mark.parametrize("kind", families.REFUSED)
def test_a_family_that_is_not_compared_is_refused_with_the_reason(kind, refused):
    error, message = refused["said"][kind]
    assert error == "ModelError" and f"models of type {kind} are refused: " in message
    assert families.REFUSED[kind] in message


def test_every_text_family_that_megatron_bridge_maps_and_transformers_knows_is_in_one_of_the_lists(refused):
    listed = families.PROVEN.keys() | families.REFUSED.keys()
    assert not families.PROVEN.keys() & families.REFUSED.keys()
    text = [name for name in refused["known"] if name.endswith("ForCausalLM")]
    kinds = {name: {kind for kind, own in CLASSES.items() if own == name} for name in text}
    assert sum(map(bool, kinds.values())) > 25
    assert [name for name, own in kinds.items() if own and not own & listed] == []


@pytest.mark.parametrize("kind", sorted(families.READ_FROM_FP8))
def test_the_actor_and_a_conversion_read_published_fp8_within_the_rounding_of_bf16(kind, quantized, refused):
    """bf16 has 7 bits behind the leading one: half a step is 2^-8. What is not FP8 stays as it is.

    DeepSeek-V3's has a layer that predicts further tokens, which a conversion alone reads.
    """
    folder, meant = quantized[kind]
    files, held = TensorFiles(folder), refused["read"][kind]
    carried = {tensor.name: tensor.read() for tensor in untrained(files)}
    assert bool(carried.keys() & meant.keys()) == (kind == "deepseek_v3")
    assert not carried.keys() & held.keys()
    present = {n for n in files.tensors if not n.endswith("_scale_inv")}
    assert len(meant) > 20 and held.keys() | carried.keys() == present
    for name in present:
        reads = [carried[name]] if name in carried else [held[name], precision.plain(name, files)]
        if name not in meant:
            assert all(torch.equal(read, files.get(name)) for read in reads)
            continue
        for read in reads:
            error = np.abs(read.double().numpy() - meant[name])
            assert (error <= 2.0**-8 * 1.0001 * np.abs(meant[name])).all(), name


def test_the_actor_and_a_conversion_read_published_mxfp4_as_exactly_what_it_stands_for(
    mxfp4, refused, converted
):
    """bf16 has all of its numbers. The bf16 folder that comes out of a conversion says nothing of MXFP4."""
    folder, meant = mxfp4
    files, held, again = TensorFiles(folder), refused["read"]["gpt_oss"], converted / "mxfp4/hf"
    bf16 = TensorFiles(again)
    assert len(meant) == 4 and held.keys() == files.tensors.keys() == bf16.tensors.keys()
    for name, tensor in held.items():
        for read in (tensor, precision.plain(name, files), bf16.get(name)):
            expected = torch.from_numpy(meant[name]) if name in meant else files.get(name)
            assert torch.equal(read.double(), expected.double()), name
    assert "quantization_config" not in json.loads((again / "config.json").read_text())


def test_a_model_of_images_is_refused(refused):
    error, message = refused["said"]["qwen2_5_vl"]
    assert error == "ModelError" and "nobody has compared its logits" in message


def test_settings_under_which_a_family_would_be_computed_wrongly_are_refused(refused):
    error, message = refused["said"]["deepseek_v2, groups"]
    assert error == "ModelError" and "topk_method=group_limited_greedy" in message
    error, message = refused["said"]["qwen3_5_moe_text, stacked"]
    assert error == "ModelError" and "experts are stacked in one tensor a layer" in message
    error, message = refused["said"]["gemma3_text, capped"]
    assert error == "ModelError" and "final_logit_softcapping=30.0 in config.json" in message
    for kind in families.NORMS_OF_ALL_HEADS:
        error, message = refused["said"][f"{kind}, tensor=2"]
        assert error == "LayoutError" and "normalises the queries of all heads at once" in message
    for kind in families.BIASED_EXPERTS:
        error, message = refused["said"][f"{kind}, tensor=2"]
        assert error == "LayoutError" and "have biases" in message and "layout.expert > 1" in message
    error, message = refused["said"]["qwen3_next, four ways"]
    assert error == "LayoutError" and "does not divide the 2 key heads" in message
    for name, words_of_it in {
        "gpt_oss, layers": "layer_types=['full_attention'",
        "nemotron, biases": "attention_bias=True",
        "exaone4, windows": "sliding_window=4096",
        "gpt_oss, rope": "'factor': 16.0",
    }.items():
        error, message = refused["said"][name]
        assert error == "ModelError" and words_of_it in message, message
    for kind in WINDOWS_BEHIND_NORMS:
        error, message = refused["said"][f"{kind}, context=2"]
        assert error == "LayoutError" and "layers whose attention sees a window" in message
