"""Adapters beside the weights of each family: what the library peft computes with the same ones."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_pmd.actor.families import POST_NORMS
from megatron_pmd.planner.shapes import FAMILIES as COUNTED
from megatron_pmd.planner.shapes import shape_of
from megatron_pmd.planner.sharding import stages
from tests.actor.adapted_reference import Adapted, compute, folder_log_probs
from tests.actor.family_models import MODELS, write_model_of
from tests.actor.launch import launch
from tests.actor.lora_programs import LORA
from tests.actor.tiny_models import STEPS, WEIGHT_TOLERANCE, config_for
from tools.write_proof_table import words

pytestmark = pytest.mark.slow

# kimi_k2 is the deepseek_v3 of tests/actor/test_lora.py under another name
KINDS = sorted(MODELS.keys() - {"kimi_k2"})
REFUSED = {
    **{
        kind: ("a norm behind linear_fc2 and linear_proj", ["linear_qkv", "linear_fc1"])
        for kind in sorted(POST_NORMS)  # pytest-xdist wants one order in every process
    },
    "gpt_oss": ("cannot merge adapters of linear_fc1 and linear_fc2", ["linear_qkv", "linear_proj"]),
}
"""Families of which some layers can have no adapter: what the error says, and those that can."""
LAYOUTS = {
    "glm4_moe": dict(tensor=2, expert=2),
    "hy_v3": dict(tensor=2, expert=2),
    "minimax_m2": dict(expert=2, data=2),
    "qwen3_next": dict(tensor=2, expert=2),
}
WITHOUT_TARGET = "linear attention alone"
"""A model that is what a stage of a long pipeline is of Qwen3-Next."""
ON_TWO = {f"{kind}, {words(layout)}": kind for kind, layout in LAYOUTS.items()}
"""Those that are compared on two ranks as well."""


@pytest.fixture(scope="module")
def results(of_families: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    targets = {of_families / kind: REFUSED[kind][1] if kind in REFUSED else [] for kind in KINDS}
    folder = tmp_path_factory.mktemp("adapters")
    refused: dict[Path, list[str]] = {of_families / kind: [] for kind in REFUSED}
    without = folder / WITHOUT_TARGET
    write_model_of(without, "qwen3_next", layer_types=["linear_attention"] * 2)
    refused[without] = ["linear_qkv", "linear_proj"]
    arguments = dict(paths=targets, refused=refused, folder=folder)
    return launch("families", ranks=1, module="tests.actor.lora_programs", **arguments)[0]


@pytest.fixture(scope="module")
def on_two(of_families: Path, results: dict[str, Any]) -> list[dict[str, Any]]:
    """Every rank's results, by ON_TWO, with the adapters of one process."""
    cases: dict[str, Any] = {
        name: (of_families / kind, LAYOUTS[kind], [], [results["measured"][kind]["saved"]])
        for name, kind in ON_TWO.items()
    }
    return launch("layouts", ranks=2, module="tests.actor.lora_programs", cases=cases)


@pytest.fixture(scope="module")
def of_peft(of_families: Path, results: dict[str, Any]) -> Any:
    def of(kind: str) -> Adapted:
        base = torch.load(of_families / kind / "reference.pt", weights_only=False)
        return compute(of_families / kind, results["measured"][kind]["adapters"], base, LORA)

    return functools.cache(of)


@pytest.fixture(params=[*KINDS, *ON_TWO])
def case(request: pytest.FixtureRequest, results: dict[str, Any], of_peft: Any) -> tuple[Any, Adapted]:
    """Every rank's results, and peft's."""
    name = request.param
    if name in ON_TWO:
        return [rank[name] for rank in request.getfixturevalue("on_two")], of_peft(ON_TWO[name])
    return [results["measured"][name]], of_peft(name)


def largest(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    return max(float((ours[name].double() - tensor).abs().max()) for name, tensor in theirs.items())


def test_log_probs_equal_pefts_on_the_same_adapters(case):
    found, peft = case
    whole = torch.full_like(peft.log_probs, torch.nan)
    for rank in found:
        own = ~rank["log_probs"].isnan()
        whole[own] = rank["log_probs"][own].double()
    torch.testing.assert_close(whole, peft.log_probs, rtol=0, atol=1e-5, equal_nan=True)


def test_whole_gradients_of_adapters_equal_pefts(case):
    (found, *_), peft = case
    assert found["gradient"].keys() == peft.gradient.keys()
    errors = {
        name: float((found["gradient"][name].double() - own).norm() / own.norm())
        for name, own in peft.gradient.items()
    }
    assert max(errors.values()) < 1e-5, errors


def test_losses_and_adapters_after_two_steps_equal_pefts_and_the_base_stays(case):
    found, peft = case
    for k, samples in enumerate(STEPS[:2]):
        loss, count = (sum(rank["steps"][k][i] for rank in found) for i in (0, 1))
        assert count == len(samples) and loss / count == pytest.approx(peft.losses[k], rel=1e-5)
        for rank in found:
            assert rank["steps"][k][2] == pytest.approx(peft.gradient_norms[k], rel=1e-5)
    assert found[0]["weights"].keys() == peft.weights[1].keys()
    assert largest(found[0]["weights"], peft.weights[1]) < WEIGHT_TOLERANCE
    assert all(rank["base is as loaded"] for rank in found)


def test_the_engines_get_the_merged_weights(case):
    assert all(rank["shards"] < 1e-6 for rank in case[0])


@pytest.mark.parametrize("kind", KINDS)
def test_merged_weights_are_those_that_peft_merges(kind, results, of_peft):
    found, peft = results["measured"][kind], of_peft(kind)
    adapted = {name.split(".lora_")[0] + ".weight" for name in peft.gradient}
    merged = {name: tensor for name, tensor in peft.merged.items() if name in found["merged"]}
    assert adapted <= merged.keys()
    assert largest(found["merged"], merged) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_peft_reads_the_adapters_folder(kind, of_families, results, of_peft):
    found = results["measured"][kind]
    assert not found["lost"]
    samples = torch.load(of_families / kind / "reference.pt", weights_only=False).samples
    read = folder_log_probs(of_families / kind, found["adapters"], samples)
    torch.testing.assert_close(read, of_peft(kind).log_probs, rtol=0, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind in COUNTED])
def test_a_plan_counts_the_weights_and_adapters_that_the_actor_holds(kind, of_families, results):
    targets = REFUSED[kind][1] if kind in REFUSED else []
    config = config_for(of_families / kind, actor={"lora": LORA | {"targets": targets}})
    (stage,) = stages(shape_of(config.model.path), config)
    found = results["measured"][kind]
    assert 4 * found["held"] == stage.weight_bytes
    assert 4 * found["gradients"] == stage.gradient_bytes


@pytest.mark.parametrize("kind", REFUSED)
def test_an_adapter_that_would_stand_wrongly_is_refused_with_the_layers_that_can_have_one(kind, results):
    error, message = results["refused"][kind]
    reason, targets = REFUSED[kind]
    assert error == "ConfigError" and reason in message
    assert all(target in message.partition("; name ")[2] for target in targets), message


def test_a_stage_of_a_pipeline_that_would_train_nothing_is_refused(results):
    error, message = results["refused"][WITHOUT_TARGET]
    assert error == "LayoutError"
    assert "no layer of 1 to 2, which are one stage of the pipeline, has linear_qkv or linear_proj" in message
