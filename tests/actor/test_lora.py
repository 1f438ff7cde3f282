"""Adapters beside frozen weights: what the library peft computes with the same ones, under layouts."""

from __future__ import annotations

import functools
import json
import shutil
from typing import Any

import pytest
import torch

from megatron_pmd.actor.lora import _draw_experts_anew
from megatron_pmd.planner.memory import checkpoint_bytes
from megatron_pmd.planner.shapes import shape_of
from megatron_pmd.planner.sharding import stages
from tests.actor.adapted_reference import Adapted, compute, folder_log_probs
from tests.actor.conftest import LAYOUTS as OF_MODELS
from tests.actor.conftest import ranks_of
from tests.actor.launch import launch
from tests.actor.tiny_models import FAMILIES, STEPS, WEIGHT_TOLERANCE, config_for

pytestmark = pytest.mark.slow

LORA = dict(rank=4, alpha=6)
ATTENTION, EXPERTS = "qwen3moe, attention", "qwen3moe, experts"
MODELS: dict[str, tuple[str, list[str]]] = {
    **{family: (family, []) for family in FAMILIES},
    ATTENTION: ("qwen3moe", ["linear_qkv", "linear_proj"]),
    EXPERTS: ("qwen3moe", ["linear_fc1", "linear_fc2"]),
}
"""In one process: the family, and the targets; none: all."""
EXPERTS_ALONE = "moe, expert=2, data=2, experts"
"""Under which no rank trains anything that it does not share out as experts."""
LAYOUTS = {**OF_MODELS, EXPERTS_ALONE: OF_MODELS["moe, expert=2, data=2"]}
NOT_ALL = {"moe, tensor=2": ATTENTION, "moe, expert_tensor=2": ATTENTION, EXPERTS_ALONE: EXPERTS}
"""Layouts under which some layers have no adapter. The first two share out an expert, which can have none."""
CASES = (*MODELS, *LAYOUTS)
"""Models in one process, then layouts."""


def model_of(name: str) -> str:
    """The one of MODELS that a layout computes."""
    return NOT_ALL.get(name, LAYOUTS[name][0])


def program(name: str, ranks: int = 1, **arguments: Any) -> list[Any]:
    return launch(name, ranks=ranks, module="tests.actor.lora_programs", **arguments)


@pytest.fixture(scope="module")
def one_process(models, tmp_path_factory) -> dict[str, Any]:
    cases = {name: (models / family, targets) for name, (family, targets) in MODELS.items()}
    return program("begin", cases=cases, folder=tmp_path_factory.mktemp("adapters"))[0]


@pytest.fixture(scope="module")
def ranks(models, one_process, tmp_path_factory):
    """Every rank's results under one of LAYOUTS; one launch for all of as many ranks."""
    done: dict[int, list[dict[str, Any]]] = {}

    def of(name: str) -> list[dict[str, Any]]:
        count = ranks_of(name, LAYOUTS)
        if count not in done:
            cases = {
                other: (
                    models / family, layout, MODELS[model_of(other)][1],
                    [one_process[model_of(other)][saved] for saved in ("saved", "saved after two steps")],
                )
                for other, (family, layout) in LAYOUTS.items()
                if ranks_of(other, LAYOUTS) == count
            }  # fmt: skip
            folder = tmp_path_factory.mktemp("of_layouts")
            done[count] = program("layouts", ranks=count, cases=cases, folder=folder)
        return [rank[name] for rank in done[count]]

    return of


@pytest.fixture(scope="module")
def behind_layouts(models, ranks) -> dict[str, Any]:
    """What one process makes of each layout's checkpoint."""
    cases = {
        name: (models / family, MODELS[model_of(name)][1], ranks(name)[0]["saved"])
        for name, (family, _) in LAYOUTS.items()
    }
    return program("go_on", cases=cases)[0]


@pytest.fixture(scope="module")
def variants(models, one_process, tmp_path_factory) -> dict[str, Any]:
    return program(
        "variants", dense=models / "qwen2", moe=models / "qwen3moe", saved=one_process["qwen2"]["saved"],
        folder=tmp_path_factory.mktemp("variants"),
    )[0]  # fmt: skip


@pytest.fixture(scope="module")
def expected(models, reference, one_process):
    def of(name: str) -> Adapted:
        family, _ = MODELS[name]
        return compute(models / family, one_process[name]["adapters"], reference(family), LORA)

    return functools.cache(of)


@pytest.fixture(params=CASES)
def case(request) -> tuple[list[dict[str, Any]], Adapted]:
    """Every rank's results, and peft's."""
    name, of = request.param, request.getfixturevalue
    if name in MODELS:
        return [of("one_process")[name]], of("expected")(name)
    return of("ranks")(name), of("expected")(model_of(name))


def largest(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max(float((ours[name].double() - theirs[name]).abs().max()) for name in ours)


def test_log_probs_equal_pefts_on_the_same_adapters(case):
    found, peft = case
    whole = torch.full_like(found[0]["log_probs"], torch.nan)
    for rank in found:
        own = ~rank["log_probs"].isnan()
        whole[own] = rank["log_probs"][own]
    torch.testing.assert_close(whole.double(), peft.log_probs, rtol=0, atol=1e-5, equal_nan=True)


def test_whole_gradients_of_adapters_equal_pefts(case):
    found, peft = case
    gradient = found[0]["gradient"]
    assert gradient.keys() == peft.gradient.keys()
    errors = {
        name: float((gradient[name].double() - own).norm() / own.norm())
        for name, own in peft.gradient.items()
    }
    assert max(errors.values()) < 1e-5, errors


def assert_steps(ranks: list[tuple[float, int, float]], peft: Adapted, k: int) -> None:
    """ranks: each one's loss sum, count and gradient norm of step k."""
    loss, count = (sum(step[i] for step in ranks) for i in (0, 1))
    assert count == len(STEPS[k]) and loss / count == pytest.approx(peft.losses[k], rel=1e-5)
    assert len({norm for *_, norm in ranks}) == 1, "the ranks clip by different norms"
    assert ranks[0][2] == pytest.approx(peft.gradient_norms[k], rel=1e-5)


def test_losses_gradient_norms_and_adapters_after_two_steps_equal_pefts(case):
    found, peft = case
    for k in (0, 1):
        assert_steps([rank["steps"][k] for rank in found], peft, k)
    assert largest(found[0]["weights"], peft.weights[1]) < WEIGHT_TOLERANCE


def test_the_third_step_after_loading_what_one_process_saved_is_pefts(case):
    """It needs the adapters and the moments of two steps; of one process it is the step after the save."""
    found, peft = case
    assert_steps([rank["third"][0] for rank in found], peft, 2)
    assert largest(found[0]["third"][1], peft.weights[2]) < WEIGHT_TOLERANCE


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_third_step_of_one_process_after_loading_what_a_layout_saved_is_pefts(
    name, ranks, behind_layouts, expected
):
    found, peft = behind_layouts[name], expected(model_of(name))
    assert largest(found["read"], ranks(name)[0]["weights"]) == 0
    step, weights = found["third"]
    assert_steps([step], peft, 2)
    assert largest(weights, peft.weights[2]) < WEIGHT_TOLERANCE


def test_no_step_changes_the_base_and_gradients_are_held_of_adapters_alone(case):
    for rank in case[0]:
        assert rank["base is as loaded"]
        assert rank["gradients"] == rank["trained"] > 0


def test_shards_for_the_engines_are_the_merged_weights(case):
    assert all(rank["shards"] < 1e-6 and not rank["irregular"] for rank in case[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_adapters_change_nothing(family, one_process, reference):
    fresh = one_process[family]["fresh"]
    torch.testing.assert_close(fresh, ranks_of_base(reference(family)), rtol=0, atol=1e-5, equal_nan=True)


def ranks_of_base(reference) -> torch.Tensor:
    parts = [[torch.nan] * len(s.prompt_tokens) + s.engine_log_probs.tolist() for s in reference.samples]
    return torch.tensor([value for part in parts for value in part])


@pytest.mark.parametrize("name", MODELS)
def test_merged_weights_are_those_that_peft_merges(name, one_process, expected):
    merged, peft = one_process[name]["merged"], expected(name).merged
    assert largest(merged, {key: peft[key] for key in merged}) < 1e-6


@pytest.mark.parametrize("name", MODELS)
def test_peft_reads_the_adapters_folder(name, models, reference, one_process, expected):
    family, _ = MODELS[name]
    found = one_process[name]
    assert not found["lost"]
    read = folder_log_probs(models / family, found["adapters"], reference(family).samples)
    torch.testing.assert_close(read, expected(name).log_probs, rtol=0, atol=1e-6, equal_nan=True)


def test_of_experts_with_adapters_beside_their_first_layers_alone_the_export_says_that_peft_loses_them(
    variants, models, reference
):
    """When peft loses none, peft_folder.LOST is needed no more."""
    found = variants["linear_fc1 alone"]
    assert "it needs those of linear_fc2 beside those of linear_fc1" in found["lost"]
    read = folder_log_probs(models / "qwen3moe", found["adapters"], reference("qwen3moe").samples)
    assert (read - found["log_probs"]).nan_to_num().abs().max() > 1e-3


def test_peft_still_drops_adapters_of_layers_that_are_called_as_those_of_experts(
    models, reference, one_process, expected, tmp_path
):
    """When this fails, peft_folder._beside_experts is needed no more."""
    folder = shutil.copytree(one_process["moonlight"]["adapters"], tmp_path / "adapters")
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["target_modules"] = sorted({name.rpartition(".")[2] for name in settings["target_modules"]})
    settings |= {"target_parameters": [], "rank_pattern": {}, "alpha_pattern": {}}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    read = folder_log_probs(models / "moonlight", folder, reference("moonlight").samples)
    assert (read - expected("moonlight").log_probs).nan_to_num().abs().max() > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_holds_adapters_alone_and_the_step_after_loading_it_is_bit_equal(name, one_process):
    result = one_process[name]
    assert result["keys"] and all(".adapter." in key for key in result["keys"])
    (step, weights), (step_resumed, weights_resumed) = result["third"], result["third_resumed"]
    assert step == step_resumed and largest(weights, weights_resumed) == 0


def test_a_plan_counts_what_the_ranks_hold(models, one_process, ranks):
    for name in CASES:
        model, layout = (name, {}) if name in MODELS else (model_of(name), LAYOUTS[name][1])
        family, targets = MODELS[model]
        config = config_for(models / family, layout, actor={"lora": LORA | {"targets": targets}})
        planned = stages(shape_of(config.model.path), config)
        found = [one_process[name]] if name in MODELS else ranks(name)
        each = len(found) // len(planned)
        for stage in planned:
            own = found[stage.number * each :][:each]
            for rank in own:
                assert 4 * rank["held"] == stage.weight_bytes
                assert 4 * rank["gradients"] == stage.gradient_bytes
            assert 8 * sum(rank["states"] for rank in own) == len(own) * stage.optimizer_bytes
        # fp32 weights and 12 bytes of states
        assert checkpoint_bytes(shape_of(config.model.path), config) == 16 * one_process[model]["trained"]


@pytest.mark.parametrize("kind", ["full", "selective"])
def test_gradients_are_whole_when_layers_without_a_trained_input_are_computed_again(kind, variants):
    assert variants[f"recompute {kind}"] == pytest.approx(variants["recompute none"], rel=1e-6)


def test_the_anchor_has_no_dropout_and_the_update_has(variants, one_process):
    once, twice = variants["anchors with dropout"]
    assert torch.equal(once.nan_to_num(), twice.nan_to_num())
    torch.testing.assert_close(once, one_process["qwen2"]["log_probs"], rtol=0, atol=1e-5, equal_nan=True)
    first, second = variants["losses with dropout"]
    assert first != second


def test_a_base_that_left_the_device_between_steps_comes_back_the_same(variants, one_process):
    assert variants["steps between which the base left"] == one_process["qwen2"]["steps"]


@pytest.mark.parametrize(
    ("which", "words"),
    [
        (
            "another alpha",
            "alpha 6, this run has adapters of rank 4 and alpha 7",
        ),
        ("no adapters", "it holds adapters of rank 4 and alpha 6, this run has no adapters"),
        ("adapters, of a model", "it holds no adapters, this run has adapters of rank 4"),
        ("another base", "its adapters belong to another base"),
    ],
)
def test_a_checkpoint_whose_adapters_are_not_this_runs_is_refused_by_name(which, words, variants):
    kind, message = variants["errors"][which]
    assert kind == "CheckpointError" and words in message, message


@pytest.mark.parametrize("name", LAYOUTS)
def test_under_another_layout_every_rank_refuses_adapters_of_another_base(name, ranks):
    for rank in ranks(name):
        kind, message = rank["another base"]
        assert kind == "CheckpointError" and "its adapters belong to another base" in message, message


def test_megatron_bridge_still_does_not_know_the_linears_that_stand_in_for_transformer_engines(variants):
    """When this fails, actor/cpu/bridge_import.classes_with_adapters is no longer needed."""
    kind, message = variants["unknown linear"]
    assert "NotImplementedError" in kind and "unrecognized for LoRA" in message


@pytest.mark.parametrize("experts", [1, 8])
def test_an_experts_adapter_begins_as_wide_as_that_of_any_matrix(experts):
    """However many experts a rank has."""
    chunk, rank, width = torch.nn.ModuleDict({"adapter": torch.nn.Module()}), 32, 512
    chunk["adapter"].linear_in = torch.nn.Module()
    chunk["adapter"].linear_in.weight = torch.nn.Parameter(torch.zeros(experts, rank, width))
    _draw_experts_anew(chunk)
    spread = chunk["adapter"].linear_in.weight.std(dim=(1, 2))
    torch.testing.assert_close(spread, torch.full((experts,), (2 / (rank + width)) ** 0.5), rtol=0.05, atol=0)
