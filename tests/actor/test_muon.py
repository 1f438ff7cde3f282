"""Muon takes the step that its definition, written out here in float64 on whole matrices, takes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.transformer.attention import SelfAttention

from megatron_pmd.actor import muon
from megatron_pmd.errors import ConfigError
from megatron_pmd.planner.shapes import shape_of
from megatron_pmd.planner.sharding import stages
from tests.actor.launch import launch
from tests.actor.muon_definition import Definition, difference
from tests.actor.tiny_models import MUON, MUON_RATES, OPTIMIZER, WEIGHT_TOLERANCE, config_for

MODULE = "tests.actor.muon_programs"
ONE_PROCESS = "qwen3moe"
LAYOUTS: dict[str, tuple[str, dict[str, int]]] = {
    "dense, tensor=2": ("qwen2", dict(tensor=2)),
    "dense, pipeline=2": ("llama", dict(pipeline=2)),
    "dense, pipeline=2, virtual_pipeline=2": ("qwen3", dict(pipeline=2, virtual_pipeline=2)),
    "moe, context=2, expert=2": ("qwen3moe", dict(context=2, expert=2)),
    "moe, tensor=2": ("qwen3moe", dict(tensor=2)),
    "moe, expert=2, data=2": ("qwen3moe", dict(expert=2, data=2)),
    "latent, tensor=2, expert=2": ("deepseek", dict(tensor=2, expert=2)),
}
ON_FOUR: dict[str, tuple[str, dict[str, int]]] = {
    "dense, tensor=2, data=2": ("llama", dict(tensor=2, data=2)),
    "moe, tensor=2, expert=2, data=2": ("qwen3moe", dict(tensor=2, expert=2, data=2)),
}
FROM_TWO: dict[str, dict[str, int]] = {
    ONE_PROCESS: dict(tensor=2, expert=2, data=2),
    "moe, tensor=2": dict(pipeline=2, data=2),
    "moe, expert=2, data=2": dict(pipeline=2, data=2),
}
"""Case that saved on one rank or two -> layout of four that loads."""
RESUMED = (ONE_PROCESS, "moe, expert=2, data=2")


@pytest.fixture(scope="module")
def one_process(
    models: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], dict[str, Any]]:
    """programs.train_one of ONE_PROCESS, and programs.trials."""
    return launch(
        "in_one_process", module=MODULE, path=models / ONE_PROCESS, latent=models / "deepseek",
        grouped=models / "llama", folder=tmp_path_factory.mktemp("muon-in-one-process"),
    )[0]  # fmt: skip


@pytest.fixture(scope="module")
def alone(one_process) -> dict[str, Any]:
    return one_process[1]


@pytest.fixture(scope="module")
def trained(one_process, models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """programs.train_one on the driver, of one process by its family, of two by their layout."""
    folder = tmp_path_factory.mktemp("muon")
    two = {
        name: (models / family, layout, folder / str(i))
        for i, (name, (family, layout)) in enumerate(LAYOUTS.items())
    }
    ranks = launch("train", ranks=2, module=MODULE, cases=two, resumed=RESUMED)
    for name in two:
        ranks[0][name]["bytes of all ranks"] = [rank[name]["bytes"]["optimizer"] for rank in ranks]
    return {ONE_PROCESS: one_process[0], **ranks[0]}


@pytest.fixture(scope="module")
def on_four(trained, models: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list]:
    """programs.train of ON_FOUR, and programs.resume of FROM_TWO, on the driver: one launch for both."""
    folder = tmp_path_factory.mktemp("muon-on-four")
    cases = {
        name: (models / family, layout, folder / str(i))
        for i, (name, (family, layout)) in enumerate(ON_FOUR.items())
    }
    saved = [(models / "qwen3moe", trained[name]["checkpoint"], layout) for name, layout in FROM_TWO.items()]
    return launch("train_and_resume", ranks=4, module=MODULE, cases=cases, saved=saved)[0]


def check_steps(case: dict[str, Any]) -> None:
    """Queries, keys, values, gate and up each alone, as the folder has them."""
    before = {n: w for n, w in case["loaded"].items() if "correction_bias" not in n}
    definition = Definition(before)
    for step, rate in zip(case["steps"], MUON_RATES, strict=True):
        after = {n: w for n, w in step["weights"].items() if n in before}
        errors = difference(definition.step(before, step["gradient"], step["norm"], rate), after)
        assert max(errors.values()) < WEIGHT_TOLERANCE, errors
        before = after


@pytest.mark.parametrize("name", [ONE_PROCESS, *LAYOUTS])
def test_steps_are_those_of_newton_schulz_in_float64_on_whole_matrices(trained, name):
    check_steps(trained[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_FOUR)
def test_steps_of_four_ranks_are_those_too(on_four, name):
    check_steps(on_four[0][name])


ALONE = [name for name in (ONE_PROCESS, *LAYOUTS) if "data" not in name and "context" not in name]
"""Without replicas: ranks that share out a row hold the same weights."""


@pytest.mark.parametrize("name", ALONE)
def test_the_planner_counts_the_states_that_a_rank_holds(trained, models, name):
    """Of replicas it counts the mean: each has whole matrices."""
    family, layout = LAYOUTS.get(name, (ONE_PROCESS, {}))
    config = config_for(models / family, layout, optimizer=MUON)
    assert (
        trained[name]["bytes"]["optimizer"] == stages(shape_of(config.model.path), config)[0].optimizer_bytes
    )


def test_replicas_hold_different_matrices_and_together_the_states_of_one_copy(trained, models):
    """Two ranks with the same attention, of which each has an expert more: no state is held twice."""
    family, layout = LAYOUTS["moe, expert=2, data=2"]
    config = config_for(models / family, layout, optimizer=MUON)
    found = trained["moe, expert=2, data=2"]["bytes of all ranks"]
    copy = trained[ONE_PROCESS]["bytes"]["optimizer"]
    assert sum(found) == copy == 2 * stages(shape_of(config.model.path), config)[0].optimizer_bytes
    assert max(found) < 0.75 * copy


@pytest.mark.parametrize("name", RESUMED)
def test_resuming_gives_the_next_step_bit_for_bit(trained, name):
    (step, weights), (resumed_step, resumed_weights) = trained[name]["third"], trained[name]["third_resumed"]
    assert step == resumed_step
    assert all(torch.equal(weights[tensor], resumed_weights[tensor]) for tensor in weights)


@pytest.mark.slow
def test_a_checkpoint_resumes_under_another_layout(trained, models, on_four):
    """The third step needs the momentum and Adam's moments, which other ranks held."""
    latent = "latent, tensor=2, expert=2"
    cases: list[Any] = [(models / "deepseek", trained[latent]["checkpoint"], {})]
    on_one = launch("resume", module=MODULE, cases=cases)[0]
    for name, resumed in zip([latent, *FROM_TWO], [*on_one, *on_four[1]], strict=True):
        (step, weights), (third_step, third_weights) = resumed, trained[name]["third"]
        assert step[2] == pytest.approx(third_step[2], rel=1e-5), name
        errors = difference(weights, third_weights)
        assert max(errors.values()) < WEIGHT_TOLERANCE, (name, errors)


def test_experts_with_biases_are_refused_under_expert_parallelism():
    """megatron-core would assert, once the ranks are built; on each rank that has experts."""
    experts: Any = torch.nn.Linear(2, 2)
    experts.weight.allreduce = experts.bias.allreduce = False
    with pytest.raises(ConfigError, match=r"optimizer\.name=muon: bias of the experts is no matrix"):
        muon.layout(experts, DistributedDataParallelConfig())


def test_a_checkpoint_of_another_optimizer_is_refused_by_its_name(alone):
    kind, message = alone["another optimizer"]
    assert kind == "CheckpointError"
    assert "was saved with optimizer.name=muon and cannot be resumed with adam" in message


def test_megatron_cores_own_layer_wise_optimizer_still_cannot_train_in_fp32(alone):
    """When it can, actor/muon.py needs no class of its own."""
    assert alone["megatron-core's own in fp32"][0] == "not a PmdError: AssertionError"


def test_a_bf16_model_is_trained_through_its_fp32_copy_and_resumes_bit_for_bit(alone):
    """Newton-Schulz then runs in bf16, as K2's: five steps of products rounded to 8 bits."""
    step = {name: tensor.double() for name, tensor in alone["bf16 step"].items()}
    definition = Definition({"proj": step["before"]})
    expected = definition.step(
        {"proj": step["before"]}, {"proj": step["gradient"]}, 1.0, OPTIMIZER.learning_rate
    )
    moved, wanted = step["after"] - step["before"], expected["proj"] - step["before"]
    assert (moved - wanted).norm() < 0.03 * wanted.norm()
    (third, weights), (resumed, resumed_weights) = alone["bf16"]["third"], alone["bf16"]["third_resumed"]
    assert third == resumed
    assert all(torch.equal(weights[name], resumed_weights[name]) for name in weights)


def test_qk_clip_scales_a_loud_heads_queries_and_keys_and_the_next_step_keeps_it(alone):
    """K2's report: of a head 4 x too loud √(1/4) on the parts without position, 1/4 on the rotary query."""
    before, after, kept = (alone["clipped"][name] for name in ("before", "after", "kept"))
    queries = "model.layers.0.self_attn.q_b_proj.weight"
    keys = "model.layers.0.self_attn.kv_b_proj.weight"
    ratio = {
        name: (after[name].float() / before[name].float()).unflatten(0, (4, -1)) for name in (queries, keys)
    }
    expected = {name: torch.ones_like(of) for name, of in ratio.items()}
    expected[queries][1, :16], expected[queries][1, 16:] = 0.5, 0.25
    expected[keys][1, :16] = 0.5
    for name, of in ratio.items():
        torch.testing.assert_close(of, expected[name], rtol=0.01, atol=0)
    assert all(torch.equal(after[name], before[name]) for name in before.keys() - ratio.keys())
    assert all(torch.equal(after[name], kept[name]) for name in after)


def test_qk_clip_scales_the_queries_and_keys_of_a_loud_group(alone):
    """Two queries to a key: with one of them 4 x too loud, both and their key get √(1/4)."""
    before, after, kept = (alone["clipped groups"][name] for name in ("before", "after", "kept"))
    names = {f"model.layers.0.self_attn.{of}_proj.weight": heads for of, heads in (("q", 4), ("k", 2))}
    for name, heads in names.items():
        ratio = (after[name].float() / before[name].float()).unflatten(0, (heads, -1))
        expected = torch.ones_like(ratio)
        expected[: heads // 2] = 0.5
        torch.testing.assert_close(ratio, expected, rtol=0.01, atol=0)
    assert all(torch.equal(after[name], before[name]) for name in before.keys() - names.keys())
    assert all(torch.equal(after[name], kept[name]) for name in after)


def test_megatron_cores_qk_clip_still_gives_a_rank_a_matrix_of_the_shape_of_all_ranks():
    """It copies it into the rank's weight. When it can, actor/settings.py refuses nothing under tensor
    parallelism. One group of two ranks' two: two queries of one row, a key and a value.
    """
    rank: Any = SimpleNamespace(
        num_query_groups_per_partition=1, query_projection_size=4, kv_projection_size=2,
        qk_clip_balancing_eta=torch.full((1, 1, 1), 0.25), config=SimpleNamespace(qk_clip_alpha=0.5),
    )  # fmt: skip
    weight = torch.ones(4, 4)
    with pytest.raises(RuntimeError, match="must match"):
        weight.copy_(SelfAttention._clip_linear_qkv(rank, weight))
