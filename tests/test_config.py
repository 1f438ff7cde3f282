"""A wrong configuration ends in one message that names the setting, before anything is started."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from megatron_pmd.config import FileSource, Objective, RunConfig, build, known_keys, override
from megatron_pmd.errors import ConfigError, LayoutError
from megatron_pmd.objectives.grpo import Grpo
from megatron_pmd.objectives.gspo import Gspo
from recipes import RECIPES, configuration, recipe


class Silent(Objective):
    """Does not say what it counts."""


@pytest.fixture
def config() -> RunConfig:
    return recipe("tiny_moe_cpu")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("rollout.temprature=1", "rollout.temprature is not a setting (did you mean rollout.temperature?)"),
        ("data.train.sied=1", "data.train.sied is not a setting (did you mean data.train.size?)"),
        ("bach.prompts_per_step=2", "bach is not a setting (did you mean batch?)"),
        ("seed.x=1", "seed is a value, not a group of settings"),
        ("seed", "'seed' is not of the form dotted.key=value"),
        ("iterations=many", "iterations: Input should be a valid integer"),
        ("algorithm.tau=0", "algorithm.tau: Input should be greater than 0"),
        (
            "algorithm.objective=grop",
            "'grop' is no objective (did you mean grpo?); use cispo, distillation, grpo, gspo, pmd,",
        ),
        ("algorithm.objective.scalling=x", "algorithm.objective=pmd (did you mean scaling?)"),
        ("algorithm.objective.scaling=x", "algorithm.objective.scaling: Input should be 'gradient'"),
        ("algorithm.scaling=x", "is not a setting (did you mean algorithm.objective.scaling?)"),
        ("algorithm.objective=7", "algorithm.objective=7 names no objective"),
        ("algorithm.objective=math:sqrt", "is no subclass of megatron_pmd.config.Objective"),
        (
            "algorithm.objective.name=tests.test_config:Silent",
            "Silent.counts must be one of sequences, tokens",
        ),
        (
            "sync.transport=icp",
            "'icp' is no transport (did you mean ipc?); use broadcast, disk, ipc,",
        ),
        ("rollout.router_policy=robin", "use round_robin, cache_aware, manual"),
        (
            'rollout.sglang={"kv_cache_dtype": "fp8_e4m3"}',
            "rollout.sglang.kv_cache_dtype='fp8_e4m3' needs scales",
        ),
        ("reward.name=exacct", "'exacct' is no reward (did you mean exact?)"),
        ("algorithm.baseline=median", "algorithm.baseline: Input should be 'mean'"),
        ("batch.prompts_per_step=3", "is not a multiple of batch.prompts_per_step=3"),
        ("batch.max_tokens_per_microbatch=20", "raise it to 24"),
        ("rollout.max_total_tokens=20", "cannot hold one sample: "),
        ("layout.expert=3", "cannot hold expert=3"),
        ("layout.virtual_pipeline=2", "with pipeline=1 there is one stage"),
        ("actor.recompute=selective", "recomputes the modules named"),
        ('actor.recompute_modules=["mlp"]', "recomputes the modules named"),
        ("actor.recompute_layers=2", "counts whole layers"),
        ("actor.fp8.recipe=blockwise", "FP8 kernels take and give bf16; set model.precision=bf16"),
        ("optimizer.moments=bf16", "is for models trained in bf16"),
        ("rollout.ranks_per_engine=3", "cannot be shared out to engines of ranks_per_engine=3"),
        ('rollout.servers=["https://a:1"]', "'https://a:1' is not of the form http://host:port"),
        (
            'rollout.servers=["http://a:1"]',
            "rollout.ranks_per_engine is for engines that this program starts",
        ),
        ("data.train.path=x", "data.train.path is a setting of data.train.kind=file, not of reasoning_gym"),
        ("data.train.kind=csv", "data.train.kind must be file or reasoning_gym or verifiers (got 'csv')"),
        ("data.train.kind=file", "data.train.path is not set and has no default: give it"),
        ("model=x", "model is a group of settings, not a value (got 'x'): set model.path, …"),
        (
            'rollout.group_filter={"max_dropped": 4, "mean_reward_above": 0.8, "mean_reward_below": 0.2}',
            "rollout.group_filter: no mean reward is above 0.8 and below 0.2",
        ),
        (
            'rollout.group_filter={"max_dropped": 4, "drop_equal_rewards": false}',
            "rollout.group_filter drops no group: set",
        ),
        ('algorithm.objective={"name": "cispo", "ratio_low": 9}', "ratio_low=9.0 is over ratio_high=5.0"),
        ("algorithm.mismatch.lowest=2", "algorithm.mismatch.lowest: Input should be less than or equal to 1"),
        ("rollout.partial=true", "rollout.partial is a group of settings, not a value (got True): set "),
        ("rollout.servers=http://a:1", "rollout.servers: Input should be a JSON list"),
        ("=3", "'=3' is not of the form dotted.key=value"),
        ("iterations=true", "iterations: true and false are no numbers and no text (got True)"),
        ("rollout.start_timeout_seconds=true", "true and false are no numbers"),
        ("model.path=false", "true and false are no numbers and no text"),
        ("seed=12345678901234567890", "seed: the number has too many digits"),
        ("seed=4294967296", "seed: Input should be less than 2147483648"),
        ("batch.samples_per_prompt=1e30", "batch.samples_per_prompt: "),
        ("optimizer.learning_rate=Infinity", "optimizer.learning_rate: Input should be a finite number"),
        ("optimizer.learning_rate=1e999", "optimizer.learning_rate: Input should be a finite number"),
        ("algorithm.tau=NaN", "algorithm.tau: Input should be a finite number"),
        ("algorithm.tau=nan", "algorithm.tau: Input should be a finite number"),
        ('actor.megatron={"a": [1e999]}', "actor.megatron: every number in it must be finite"),
        ('rollout.sglang={"a": NaN}', "rollout.sglang: every number in it must be finite"),
        ('data.template_arguments={"tokenize": true}', "data.template_arguments.tokenize: it is given"),
        ("name=../elsewhere", "name: String should match pattern"),
    ],
)
def test_a_wrong_setting_is_named(config: RunConfig, setting: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        override(config, [setting])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (["actor.fp8.recipe=delayed", "actor.fp8.last_layers_bf16=1"], "maxima of all layers"),
        (
            ['rollout.servers=["http://a:1"]', "rollout.ranks_per_engine=null"],
            "sync.transport=ipc is for engines beside the actors",
        ),
        (["sync.transport=broadcast"], "sync.transport=broadcast is for rollout.servers"),
        (
            ['rollout.servers=["http://a:1", "http://a:1"]', "rollout.ranks_per_engine=null"],
            "names a server twice",
        ),
        (
            ["actor.fp8.recipe=tensorwise", "actor.fp8.parameter_gather=true", "optimizer.offload=1"],
            "writes bf16 parameters, not FP8 ones",
        ),
        (
            ["actor.fp8.recipe=delayed", "actor.recompute=selective", 'actor.recompute_modules=["moe_act"]'],
            "would add to the history of maxima",
        ),
        (["optimizer.moments=bf16", "optimizer.offload=0.5"], "on the host keeps fp32 moments"),
        (
            ["algorithm.objective.clip_low=0.1"],
            "algorithm.objective.clip_low is a setting of grpo and gspo, not of algorithm.objective=pmd",
        ),
        (
            ["algorithm.objective=cispo", "algorithm.objective.normaliser=none"],
            "algorithm.objective.normaliser is a setting of pmd and reinforce",
        ),
        (["algorithm.mismatch.weight=token_tis"], "a mean over sequences; there are sequence_tis"),
        (
            ["algorithm.objective=grpo", "algorithm.mismatch.weight=sequence_tis"],
            "a mean over tokens; there are token_tis",
        ),
        (
            ["algorithm.mismatch.weight=sequence_tis", "algorithm.mismatch.low=0.1"],
            "algorithm.mismatch.low is not used by algorithm.mismatch.weight=sequence_tis",
        ),
        (
            ["algorithm.mismatch.weight=sequence_mis", "algorithm.mismatch.low=3"],
            "low=3.0 is over high=2.0",
        ),
        (["algorithm.mismatch.weight=token_veto", "algorithm.anchor=engine"], "with algorithm.anchor=engine"),
        (["algorithm.anchor=engine", "rollout.partial.extra_groups=2"], "of earlier weights, not of π_t"),
        (["data.sampling=curriculum"], "needs data.train.difficulty_key"),
        (
            ["algorithm.objective=sft", "algorithm.mismatch.weight=token_tis"],
            "no engine has sampled the responses",
        ),
        (["algorithm.objective=sft"], "warm_start is supervised training beside a rollout"),
        (
            ["algorithm.objective=sft", "warm_start=null"],
            "a problem has one response, its answer; set it to 1",
        ),
        (["actor.experts.dispatcher=deepep", "layout.expert=1"], "set layout.expert above 1"),
        (
            [
                "actor.experts.replay_routing=true",
                'algorithm.ptx={"weight":1, "examples_per_step":4, "source":{"path":"x", "kind":"file"}}',
            ],
            "no engine has chosen experts for the examples",
        ),
        (
            [
                "actor.experts.replay_routing=true",
                "algorithm.objective=sft",
                "warm_start=null",
                "batch.samples_per_prompt=1",
            ],
            "algorithm.objective=sft: no engine has chosen experts",
        ),
        (["layout.context=2", "batch.max_tokens_per_microbatch=11"], "shared by layout.context=2 ranks"),
    ],
)
def test_settings_that_exclude_each_other_are_refused_with_the_reason(
    config: RunConfig, settings: list[str], reason: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        override(config, ["model.precision=bf16", *settings])
    assert reason in str(caught.value)


def test_a_pass_holds_the_tokens_of_all_ranks_that_share_its_sequences(config: RunConfig) -> None:
    shared = override(config, ["layout.context=2", "batch.max_tokens_per_microbatch=12"])
    assert shared.tokens_per_pass == 24 and shared.layout.ranks == 4


def test_a_rollout_may_take_as_long_as_the_groups_that_its_filter_drops_one_after_the_other(
    config: RunConfig,
) -> None:
    patience = ["rollout.request_timeout_seconds=10", "rollout.retries=1", "rollout.temperature=1"]
    filtered = ["rollout.group_filter.max_dropped=3", "rollout.group_filter.drop_equal_rewards=false"]
    filtered.append("rollout.group_filter.mean_reward_above=0")
    of_agent = ['rollout.agent={"function":"x.py:solve","timeout_seconds":100}', "rollout.max_turns=2"]
    of_teacher = ['algorithm.teacher={"url":"http://x","timeout_seconds":30,"retries":2}']
    for settings, seconds in ((of_agent, 2 * 20 + 100), (of_teacher, 20 + 90)):
        once, again = (override(config, [*patience, *settings, *more]) for more in ([], filtered))
        assert (once.longest_rollout_seconds, again.longest_rollout_seconds) == (seconds, 4 * seconds)


def test_leaving_one_out_of_one_is_refused(config: RunConfig) -> None:
    with pytest.raises(ConfigError, match="samples_per_prompt must be at least 2"):
        override(config, ["algorithm.baseline=mean_loo", "batch.samples_per_prompt=1"])


def test_experts_sharded_otherwise_than_megatron_can_sum_are_refused(config: RunConfig) -> None:
    with pytest.raises(LayoutError, match="would not sum the experts' gradients"):
        override(config, ["layout.expert=1", "layout.tensor=2", "layout.expert_tensor=1"])


@pytest.mark.parametrize("settings", [[], ["algorithm.objective=grpo", "algorithm.objective.clip_low=0.1"]])
def test_a_resolved_configuration_reads_back_as_itself(config: RunConfig, settings: list[str]) -> None:
    resolved = override(config, settings)
    assert build(json.loads(resolved.model_dump_json())) == resolved


def test_naming_an_objective_is_the_same_in_three_ways_and_in_any_order(config: RunConfig) -> None:
    expected = Grpo(clip_low=0.1)
    for words in (
        ["algorithm.objective=grpo", "algorithm.objective.clip_low=0.1"],
        ["algorithm.objective.clip_low=0.1", "algorithm.objective.name=grpo"],
        ['algorithm.objective={"name": "grpo", "clip_low": 0.1}'],
    ):
        found = override(config, words).algorithm.objective
        assert type(found) is Grpo and found == expected
        # named again, it keeps what was set; another has none of it
        again = override(override(config, words), ["algorithm.objective=grpo"])
        assert again.algorithm.objective == expected
        assert override(again, ["algorithm.objective=gspo"]).algorithm.objective == Gspo()


def test_another_source_puts_aside_the_settings_of_the_recipes(config: RunConfig) -> None:
    found = override(config, ["data.train.path=x.jsonl", "data.train.kind=file"])
    assert found.data.train == FileSource(path="x.jsonl")


GYM = {"kind": "reasoning_gym", "task": "spell_backward", "size": 10}
MIXED = [
    {"name": "a", "source": GYM, "weight": 2},
    {"name": "b", "source": {"kind": "file", "path": "b.jsonl"}, "tau": 0.3, "system_prompt": "Be brief."},
]


def test_a_list_of_sources_reads_back_and_is_changed_by_place(config: RunConfig) -> None:
    """In whatever order list and settings are given; another kind of source drops the first one's."""
    words = ["data.train.1.weight=5", f"data.train={json.dumps(MIXED)}", "data.train.0.source.path=x.jsonl"]
    mixed = override(config, [*words, "data.train.0.source.kind=file", 'data.system_prompt="Think."'])
    assert build(json.loads(mixed.model_dump_json())) == mixed
    first, second = mixed.problem_sources("train")
    assert (first.key, first.name, first.weight, first.tau) == ("data.train.0", "a", 2, None)
    assert (first.source, first.data.system_prompt) == (FileSource(path="x.jsonl"), "Think.")
    assert (second.weight, second.tau, second.data.system_prompt) == (5, 0.3, "Be brief.")
    assert first.reward == second.reward == config.reward
    assert first.max_prompt_tokens == config.batch.max_prompt_tokens


def test_a_single_source_has_the_runs_settings_and_no_name(config: RunConfig) -> None:
    (found,) = config.problem_sources("train")
    assert (found.key, found.name, found.source) == ("data.train", "", config.data.train)
    assert (found.data, found.reward, found.tau) == (config.data, config.reward, None)
    assert override(config, ["data.evaluation=null"]).problem_sources("evaluation") == ()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"weight": True}, r"data\.train\.1\.weight: true and false are no numbers"),
        ({"weight": float("inf")}, r"data\.train\.1\.weight: "),
        ({"tau": 0}, r"data\.train\.1\.tau: Input should be greater than 0"),
        ({"name": "a/b"}, r"data\.train\.1\.name: String should match"),
        (
            {"max_prompt_tokens": 10**6},
            r"data\.train\.1\.max_prompt_tokens=1000000 is over batch\.max_prompt",
        ),
        ({"template_arguments": {"tokenize": 1}}, r"data source 'b': template_arguments\.tokenize"),
        ({"reward": {"name": "remote"}}, r"data source 'b': reward\.name=remote needs reward\.remote\.url"),
        ({"source": {"kind": "csv"}}, r"data\.train\.1\.source\.kind must be file or reasoning_gym"),
        ({"source": 3}, r"data\.train\.1\.source is a group of settings, not a value"),
    ],
)
def test_a_sources_bad_value_is_named_with_its_place(
    config: RunConfig, change: dict[str, Any], reason: str
) -> None:
    values = config.model_dump(mode="json")
    values["data"]["train"] = [MIXED[0], MIXED[1] | change]
    with pytest.raises(ConfigError, match=reason):
        build(values)


def test_a_curriculum_of_a_mixture_needs_each_sources_difficulty(config: RunConfig) -> None:
    with pytest.raises(ConfigError, match=r"needs data\.train\.0\.source\.difficulty_key"):
        override(config, [f"data.train={json.dumps(MIXED)}", "data.sampling=curriculum"])


def test_every_setting_is_read_somewhere() -> None:
    """As an attribute; the bounds of a mismatch weight alone are read by name (MismatchWeight.bounds)."""
    read = {
        node.attr
        for path in (Path(__file__).parents[1] / "megatron_pmd").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
    }
    keys = known_keys(RunConfig)
    values = [key for key in keys if not any(other.startswith(f"{key}.") for other in keys)]
    assert [key for key in values if key.rpartition(".")[2] not in read] == ["algorithm.mismatch.cap"]


def test_settings_are_frozen(config: RunConfig) -> None:
    with pytest.raises(ValidationError):
        config.seed = 3  # type: ignore[misc]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_builds_and_its_run_has_its_name(name: str) -> None:
    assert recipe(name).name == name


def test_the_papers_batch_is_8192_samples_in_16_steps_of_512() -> None:
    """arXiv 2602.05933: 512 prompts with 16 responses each are a rollout, 32 prompts a step."""
    batch = recipe("qwen3_30b_a3b_dapo_32xh100").batch
    assert (batch.samples_per_rollout, batch.steps_per_rollout, batch.samples_per_step) == (8192, 16, 512)


def test_known_keys_reach_into_unions_of_sources_and_of_objectives() -> None:
    keys = known_keys(RunConfig)
    assert "data.train.task" in keys and "data.evaluation.prompt_key" in keys
    assert "algorithm.objective.ratio_high" in keys and "algorithm.objective.scaling" in keys


def test_configuration_and_recipes_import_no_torch() -> None:
    code = "import sys, megatron_pmd.cli.main, recipes; recipes.recipe('tiny_moe_cpu')"
    subprocess.run([sys.executable, "-c", f"{code}; sys.exit('torch' in sys.modules)"], check=True)


def test_full_verification_without_shared_memory_is_refused(config: RunConfig) -> None:
    values = config.model_dump(mode="json")
    values["sync"] |= {"verify": "full", "transport": "broadcast"}
    with pytest.raises(ConfigError, match=r"sync\.verify=full needs sync\.transport=ipc"):
        build(values)


@pytest.mark.parametrize("precision, bounds", [("fp32", (1e-5, 1e-4)), ("bf16", (0.1, 2.0))])
def test_a_runs_configuration_says_which_bounds_are_in_force(
    precision: str, bounds: tuple[float, float]
) -> None:
    """config.json is what the resolved tree is written as; a bound of the user's own stays."""
    config = configuration("tiny_moe_cpu", [f"model.precision={precision}"])
    sync = config.model_dump(mode="json")["sync"]
    assert (sync["mean_log_prob_difference"], sync["p99_log_prob_difference"]) == bounds
    own = configuration("tiny_moe_cpu", ["sync.p99_log_prob_difference=0.5"])
    assert own.log_prob_bounds == (1e-5, 0.5)


@pytest.mark.parametrize("name", ["qwen3_30b_a3b_fp8_32xh100", "deepseek_v3_256xh100"])
def test_engines_in_fp8_have_wider_bounds_whatever_the_actor_computes_in(name: str) -> None:
    config = recipe(name)
    assert config.rollout.fp8
    assert config.resolved().sync.mean_log_prob_difference == 0.3
    assert config.resolved().sync.p99_log_prob_difference == 5.0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not JSON"),
        (b'{"name": "\xff"}', "not JSON: 'utf-8' codec"),
        (b"[1]", "not a JSON object; give the config.json of a run"),
        (b"{}", "name is not set and has no default"),
    ],
)
def test_a_config_json_that_is_none_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        configuration(str(tmp_path / "config.json"), [])


def test_a_nucleus_is_warned_of_by_name_and_no_recipe_has_one() -> None:
    (warning,) = override(recipe("tiny_moe_cpu"), ["rollout.top_p=0.9"]).warnings()
    assert "rollout.top_p=0.9" in warning and "another policy than the anchor" in warning
    assert [name for name in RECIPES if recipe(name).warnings()] == []
