"""Plans of the recipes, and what a plan refuses."""

from __future__ import annotations

import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from megatron_pmd.config import RunConfig, override
from megatron_pmd.errors import LayoutError
from megatron_pmd.launch.cluster import load_cluster
from megatron_pmd.planner import memory
from megatron_pmd.planner.hardware import H100, Assumptions, Machines
from megatron_pmd.planner.memory import microbatches_per_step
from megatron_pmd.planner.planning import check, make_plan, nearest
from megatron_pmd.planner.shapes import shape_of
from megatron_pmd.planner.sharding import layers_of_stages, stages
from megatron_pmd.planner.table import show
from recipes import RECIPES, recipe

ON_GPUS = [name for name in RECIPES if not name.endswith("_cpu")]
PROJECT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def h100() -> Machines:
    return load_cluster("h100").machines


@pytest.mark.parametrize("name", ON_GPUS)
def test_every_recipe_fits_the_cluster_it_is_named_after(name: str, h100: Machines) -> None:
    plan = make_plan(recipe(name), h100)
    assert plan.problems == []
    assert f"_{plan.config.devices}xh100" in name
    assert plan.nodes == -(-plan.config.devices // 8)


@pytest.mark.parametrize("name", [n for n in RECIPES if n.endswith("_cpu")])
def test_the_cpu_recipes_fit_the_lab(name: str) -> None:
    assert make_plan(recipe(name), load_cluster("lab").machines).problems == []


@pytest.mark.parametrize("name", RECIPES)
def test_the_shards_of_all_ranks_together_are_the_model(name: str) -> None:
    """Split and routed parameters exactly once over the ranks that share them; replicated ones on each.

    Without adapters, which tests/actor/test_lora.py counts.
    """
    config = override(recipe(name), ["actor.lora=null"])
    shape = make_plan(config, Machines(H100, 8, 1, 1.0)).shape
    parts = [shape.layer(number) for number in range(shape.layers)]
    replicated = sum(part[1] for part in parts) + shape.hidden
    layout, found = config.layout, stages(shape, config)
    together = sum(
        stage.dense * layout.tensor + stage.experts * layout.expert * layout.experts_tensor for stage in found
    )
    assert together == shape.total + (layout.tensor - 1) * replicated


def test_the_paper_run_has_its_sixteen_steps_of_512_samples() -> None:
    for name, tau in (("qwen3_30b_a3b_dapo_32xh100", 0.1), ("qwen3_30b_a3b_dapo_tau005_32xh100", 0.05)):
        config = recipe(name)
        assert config.algorithm.tau == tau
        assert config.batch.steps_per_rollout == 16
        assert config.batch.samples_per_step == 512
        assert config.batch.samples_per_rollout == 8192
        assert config.engines == 8


def test_adam_in_fp32_on_unsharded_bf16_needs_eighteen_bytes_a_parameter(h100: Machines) -> None:
    """2 weight + 4 gradient + 4 main + 8 moments: ZeRO's 16 (arXiv 1910.02054), with fp32 gradients."""
    config = override(
        recipe("qwen2_5_7b_dapo_8xh100"), ["layout.tensor=1", "layout.data=1", "rollout.tensor_parallel=1"]
    )
    plan = make_plan(config, h100)
    (stage,) = plan.stages
    assert stage.weight_bytes + stage.gradient_bytes + stage.optimizer_bytes == 18 * plan.shape.total


def test_muon_keeps_one_momentum_of_matrices_and_adam_both_moments_of_the_rest(h100: Machines) -> None:
    """Moonlight-16B-A3B's matrices are all but two embeddings of 163,840 x 2,048, and its norms: of 27 layers
    two of the width and one of the latent 512, and a last one."""
    name = "moonlight_16b_a3b_16xh100"
    one = ["layout.tensor=1", "layout.expert=1", "layout.data=2", "rollout.ranks_per_engine=2"]
    plans = [
        make_plan(override(recipe(name), [*one, f"optimizer.name={kind}"]), h100) for kind in ("adam", "muon")
    ]
    rest = 2 * 163_840 * 2048 + 27 * (2 * 2048 + 512) + 2048
    matrices = plans[0].shape.total - rest
    adam, muon = (plan.stages[0].optimizer_bytes for plan in plans)
    assert adam == 12 * (matrices + rest) / 2
    assert muon == (8 * matrices + 12 * rest) / 2
    assert plans[0].checkpoint_bytes - plans[1].checkpoint_bytes == 4 * matrices
    # of a save, Adam's states alone are gathered: 16 ranks' nodes of 8 would hold 12 bytes of all parameters
    assert plans[1].host["save"]["gathered states"] == 2 * 12 * rest


def test_a_layout_that_cannot_fit_is_refused_and_the_nearest_that_does_is_named(h100: Machines) -> None:
    settings = ["layout.tensor=1", "layout.data=32", "layout.expert=1"]
    plan = make_plan(override(recipe("qwen3_30b_a3b_dapo_32xh100"), settings), h100)
    with pytest.raises(LayoutError) as refusal:
        check(plan)
    message = str(refusal.value)
    assert "update needs 2" in message and "gradients 122.1 GB" in message
    near = nearest(plan)
    assert near is not None and near.problems == []
    assert near.config.layout.ranks == 32
    words = [word for word in message.split() if word.startswith(("layout.", "rollout.", "actor."))]
    assert make_plan(override(plan.config, words), h100).problems == []


def test_the_nearest_layout_that_is_named_can_be_typed_where_the_recipe_recomputes_modules(
    h100: Machines,
) -> None:
    """`full` allows no recompute_modules: what is printed has to empty them."""
    settings = [
        *("actor.recompute=selective", 'actor.recompute_modules=["moe_act"]'),
        *("batch.max_tokens_per_microbatch=163840", "layout.context=1"),
    ]
    plan = make_plan(override(recipe("qwen3_30b_a3b_dapo_32xh100"), settings), h100)
    with pytest.raises(LayoutError) as refusal:
        check(plan)
    typed = str(refusal.value).split("nearest that fits: ")[1].rpartition(" (")[0].split()
    assert {"actor.recompute=full", "actor.recompute_modules=[]"} <= {*typed}
    assert make_plan(override(plan.config, typed), h100).problems == []


def test_separate_engines_hold_nothing_of_a_ranks_device_and_a_rank_nothing_of_theirs(h100: Machines) -> None:
    config = recipe("qwen3_30b_a3b_dapo_32xh100")
    shared = make_plan(config, h100)
    apart = make_plan(override(config, ["rollout.placement=separate"]), h100)
    assert apart.phases["update"]["left-overs"] < shared.phases["update"]["left-overs"]
    assert not {"engine weights", "KV cache"} & {*apart.phases["update"], *apart.phases["sync"]}
    # the optimizer stays on the rank's device in a sync; shared, it makes room for the engine's weights
    assert apart.phases["sync"]["optimizer"] == shared.phases["update"]["optimizer"]
    assert "optimizer" not in shared.phases["sync"]
    engine, beside = apart.phases["rollout"], shared.phases["rollout"]
    assert engine["engine weights"] == beside["engine weights"]
    assert engine["left-overs"] < beside["left-overs"]
    # engines of the node open the host's buckets; to others a rank sends its own, in a message beside them
    bucket = config.sync.bucket_megabytes * 2**20
    nodes = ["rollout.placement=separate", "layout.engine_nodes=4", "sync.transport=broadcast"]
    sent = make_plan(override(config, nodes), h100)
    assert sent.phases["sync"]["buckets"] - apart.phases["sync"]["buckets"] == 3 * bucket
    assert apart.host["save"]["weight buckets"] == 2 * bucket
    assert "weight buckets" not in sent.host["save"]


DEFAULT_ENGINES = "rollout.sglang={}"
"""They take SGLang's own share of the GPU, which leaves too little to the actor."""
SERVERS = 'rollout.servers=["http://a:30000"]'
SUPERVISED = ["algorithm.objective=sft", "batch.samples_per_prompt=1", "actor.experts.replay_routing=false"]


@pytest.mark.parametrize(
    ("settings", "replay", "phases"),
    [
        (
            [SERVERS, "sync.transport=broadcast"],
            False,
            ["update", "save", "sync"],
        ),
        (SUPERVISED, False, ["update", "save"]),
        ([], True, ["update", "save"]),
    ],
)
def test_engines_that_a_run_does_not_have_take_nothing_of_its_devices(
    settings: list[str], replay: bool, phases: list[str], h100: Machines
) -> None:
    config = override(recipe("qwen3_30b_a3b_dapo_32xh100"), [DEFAULT_ENGINES])
    with_engines = make_plan(config, h100)
    with pytest.raises(LayoutError, match="set mem_fraction_static"):
        check(with_engines)
    plan = make_plan(override(config, settings), h100, replay=replay)
    check(plan)
    assert [*plan.phases] == phases
    assert not any("engine" in owner for owners in plan.phases.values() for owner in owners)
    alone = memory.actor_left_over_bytes(config, plan.assumptions)
    assert plan.phases["update"]["left-overs"] == alone < with_engines.phases["update"]["left-overs"]


def test_an_iteration_is_not_charged_for_what_it_does_not_do(h100: Machines) -> None:
    """A replay samples nothing and sends weights to nobody; supervised training has no anchor either. Of
    servers a plan knows no speed. The engines' own anchor is compared in one step of 16."""
    config = recipe("qwen3_30b_a3b_dapo_32xh100")
    whole = make_plan(config, h100).cost
    moved = whole.seconds["sync"] - 2 * 30_532_122_624 / 10e9
    replayed = make_plan(config, h100, replay=True).cost.seconds
    assert (replayed["rollout"], replayed["anchor"]) == (0, whole.seconds["anchor"])
    assert replayed["sync"] == pytest.approx(moved)
    supervised = make_plan(override(config, SUPERVISED), h100).cost
    assert (supervised.seconds["rollout"], supervised.seconds["anchor"], supervised.anchor_flops) == (0, 0, 0)
    assert supervised.seconds["sync"] == pytest.approx(moved)
    servers = [SERVERS, "sync.transport=disk", DEFAULT_ENGINES]
    served = make_plan(override(config, servers), h100).cost.seconds
    assert "rollout" not in served and served["sync"] == whole.seconds["sync"]
    cheap = make_plan(override(config, ["algorithm.anchor=engine"]), h100).cost
    assert cheap.seconds["anchor"] == pytest.approx(whole.seconds["anchor"] / 16)
    assert cheap.anchor_flops == pytest.approx(whole.anchor_flops / 16)


@pytest.mark.parametrize(
    ("settings", "replay", "words"),
    [
        (
            [SERVERS, "sync.transport=disk", DEFAULT_ENGINES],
            False,
            ["none; 1 server(s) of others", "together, without a rollout and a checkpoint"],
        ),
        ([], True, ["none", "together, without a checkpoint"]),
    ],
)
def test_a_plan_shows_no_engines_that_a_run_does_not_have(
    settings: list[str], replay: bool, words: list[str], h100: Machines
) -> None:
    text = StringIO()
    config = override(recipe("qwen3_30b_a3b_dapo_32xh100"), settings)
    show(make_plan(config, h100, replay=replay), Console(file=text, width=120))
    assert all(word in text.getvalue() for word in words)
    assert "KV cache" not in text.getvalue() and "devices of their own" not in text.getvalue()


GROUPS = "groups of weight updates"


@pytest.mark.parametrize(
    ("settings", "groups"),
    [
        ([], 4),  # 16 ranks belong to the engines of four nodes
        (["layout.engine_nodes=8"], 2),
        (["layout.engine_nodes=2"], 8),
        (["layout.engine_nodes=1"], 8),  # all 16, of which a node has 8
    ],
)
def test_nccl_keeps_a_group_for_each_rank_that_sends_to_an_engine_node_on_both_sides(
    settings: list[str], groups: int, h100: Machines
) -> None:
    plan = make_plan(override(recipe("qwen3_30b_a3b_overlap_48xh100"), settings), h100)
    for phase in ("rollout", "update", "save", "sync"):
        assert plan.phases[phase][GROUPS] == groups * plan.assumptions.communicator_bytes


def test_engines_on_the_ranks_own_nodes_need_no_group_for_updates(h100: Machines) -> None:
    config = override(recipe("qwen3_30b_a3b_dapo_32xh100"), ["rollout.placement=separate"])
    assert all(GROUPS not in owners for owners in make_plan(config, h100).phases.values())


def test_the_groups_of_updates_are_room_that_an_engines_cache_cannot_have(h100: Machines) -> None:
    """The cache is sized before the groups are made."""
    config = recipe("qwen3_30b_a3b_overlap_48xh100")
    greedy = make_plan(override(config, ["rollout.sglang.mem_fraction_static=0.76"]), h100)
    with pytest.raises(LayoutError, match=r"set mem_fraction_static=0\.755"):
        check(greedy)
    assert (
        sum(greedy.phases["rollout"].values()) - greedy.phases["rollout"][GROUPS] < 0.95 * H100.memory_bytes
    )


def test_the_assumed_buffers_of_a_communicator_are_between_those_of_rings_in_a_node_and_out_of_it() -> None:
    """16 channels. NCCL 2.30, src/include/device.h: LL has 512 threads x 8 lines of 16 bytes x 8 steps, LL128
    640 x 120 x 8 bytes x 8, Simple NCCL_BUFFSIZE = 4 MiB; each allocation is in pages of 2 MiB."""
    page = 2 * 2**20
    receives = -(-(512 * 8 * 16 * 8 + 640 * 120 * 8 * 8 + 4 * 2**20) // page) * page
    assert receives == 10_485_760  # as NVIDIA/nccl#1685 saw it, beside 2,097,152 of the sender's
    assert 16 * (receives + page) <= Assumptions().communicator_bytes <= 16 * 2 * receives


def test_an_engine_without_room_for_one_sample_is_refused(h100: Machines) -> None:
    settings = [
        "rollout.tensor_parallel=1",
        "rollout.ranks_per_engine=4",
        'rollout.sglang={"mem_fraction_static": 0.73}',
    ]
    plan = make_plan(override(recipe("qwen3_30b_a3b_dapo_32xh100"), settings), h100)
    with pytest.raises(LayoutError, match="not for one sample of 10,240"):
        check(plan)


def test_an_fp8_engine_whose_blocks_do_not_divide_is_refused(h100: Machines) -> None:
    """SGLang refuses Qwen3-30B-A3B in FP8 on 4 devices: 768 / 4 = 192 is not a multiple of 128."""
    settings = ["rollout.tensor_parallel=4"]
    plan = make_plan(override(recipe("qwen3_30b_a3b_fp8_32xh100"), settings), h100)
    assert any("an expert's 768 / 4" in problem for problem in plan.problems)
    whole = override(plan.config, ['rollout.sglang={"ep_size": 4, "mem_fraction_static": 0.7}'])
    assert make_plan(whole, h100).problems == []


def test_of_an_engine_with_deepep_every_rank_has_whole_experts_whatever_ep_size_says(h100: Machines) -> None:
    """SGLang sets ep_size to tp_size then; 2048 / 32 would not be made of whole blocks."""
    config = override(recipe("kimi_k2_lora_64xh100"), ["rollout.tensor_parallel=32"])
    assert config.rollout.sglang["ep_size"] == 64
    assert memory.unaligned_widths(shape_of(config.model.path), config) == []
    with pytest.raises(LayoutError, match=r"sync needs .* \(engine weights 38"):
        check(make_plan(config, h100))


def test_too_little_host_memory_is_refused_before_the_job_queues() -> None:
    """1 TB is not enough for 30B on one node with everything offloaded: the failure slime#1851 reports."""
    config = override(recipe("qwen3_30b_a3b_dapo_32xh100"), ["layout.data=2"])
    plan = make_plan(config, Machines(H100, 8, int(0.5e12), 2e9))
    assert [problem for problem in plan.problems if "host memory" in problem]


def test_recorded_routing_is_counted_on_the_drivers_node(h100: Machines) -> None:
    """A byte for each of 48 x 8 experts, in the sample and packed: docs/benchmarks.md, in proportion."""
    config = recipe("qwen3_30b_a3b_dapo_32xh100")
    plain, recorded = (
        make_plan(override(config, [f"actor.experts.replay_routing={value}"]), h100).host["save"]["rollouts"]
        for value in ("false", "true")
    )
    assert recorded - plain == 2 * 48 * 8 * 8192 * 10240


def test_samples_longer_than_the_models_positions_are_refused(h100: Machines) -> None:
    config = override(recipe("moonlight_16b_a3b_16xh100"), ["batch.max_response_tokens=8192"])
    plan = make_plan(config, h100)
    with pytest.raises(LayoutError, match=r"(?s)8,192 positions.*the layout fits"):
        check(plan)
    assert plan.trainer_problems == []


def test_nodes_that_are_not_filled_are_refused(h100: Machines) -> None:
    config = override(recipe("qwen2_5_7b_dapo_8xh100"), ["layout.data=6"])
    assert any("do not fill nodes of 8" in problem for problem in make_plan(config, h100).problems)
    config = override(recipe("qwen2_5_7b_dapo_8xh100"), ["layout.data=12", "rollout.tensor_parallel=12"])
    assert any("8 + 4 ranks on nodes 0, 1" in problem for problem in make_plan(config, h100).problems)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["layout.tensor=8", "layout.data=4"], "does not divide the 4 key-value heads"),
        (["layout.pipeline=5"], "does not divide the 48 layers"),
    ],
)
def test_a_layout_the_model_cannot_have_is_refused(settings: list[str], message: str, h100: Machines) -> None:
    with pytest.raises(LayoutError, match=message):
        make_plan(override(recipe("qwen3_30b_a3b_dapo_32xh100"), settings), h100)


def test_uneven_pipeline_stages_are_dealt_out_as_megatron_core_does() -> None:
    counts = [len(stage) for stage in layers_of_stages(61, recipe("deepseek_v3_256xh100"))]
    assert counts == [7, 8, 8, 8, 8, 8, 8, 6]
    assert sum(len(stage) for stage in layers_of_stages(61, recipe("kimi_k2_1t_512xh100"))) == 61


def test_micro_batches_follow_from_tokens_of_mean_length() -> None:
    """512 samples of (2048 + 8192) / 2 tokens over 8 replicas, 20,480 a pass: 16."""
    config: RunConfig = recipe("qwen3_30b_a3b_dapo_32xh100")
    assert microbatches_per_step(config) == 512 * 5120 // 8 // 20480


def test_planning_imports_no_torch() -> None:
    program = (
        "import sys\n"
        "for name in ('torch', 'numpy', 'transformers', 'megatron', 'sglang'): sys.modules[name] = None\n"
        "sys.argv = ['megatron-pmd', 'plan', 'kimi_k2_1t_512xh100']\n"
        "from megatron_pmd.cli.main import main\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "1,026,408,209,408 parameters" in done.stdout
