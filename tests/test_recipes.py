"""A recipe is asked for by name, or is a function in a file of the user's; every other word is answered."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from megatron_pmd.config import override
from megatron_pmd.data.problems import Problem
from megatron_pmd.errors import ConfigError
from recipes import configuration, recipe

SMALLER = "import recipes\ndef {name}() -> recipes.RunConfig:\n    return recipes.recipe('tiny_moe_cpu')\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("function", "word"),
    [
        ("mine", "mine.py"),  # the file's name
        ("another", "mine.py"),  # the only one that returns a RunConfig
        ("another", "mine.py:another"),
        ("_hidden", "mine.py:_hidden"),
    ],
)
def test_a_file_of_the_users_is_a_recipe(folder: Path, function: str, word: str) -> None:
    (folder / "mine.py").write_text(SMALLER.format(name=function) + "def helper() -> int:\n    return 1\n")
    assert configuration(word, ["iterations=2"]).iterations == 2
    assert recipe(str(folder / word)) == recipe("tiny_moe_cpu")


def test_a_module_of_the_current_folder_is_a_recipe(folder: Path) -> None:
    (folder / "recipe_of_this_folder.py").write_text(SMALLER.format(name="small"))
    assert recipe("recipe_of_this_folder:small") == recipe("tiny_moe_cpu")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "wrong.py has no function wrong, and none that says it returns a RunConfig"),
        (
            SMALLER.format(name="a") + SMALLER.format(name="b"),
            "wrong.py has several recipes, a and b: name one, as in wrong.py:a",
        ),
        ("def wrong(): return {}\n", "recipe wrong.py returned a dict, not a RunConfig"),
        (
            "from megatron_pmd.config import Batch\ndef wrong(): return Batch(prompts_per_rolout=1)\n",
            "prompts_per_rolout is not a setting (did you mean batch.prompts_per_rollout?)",
        ),
        ("import no_such_module\n", "wrong.py cannot be imported: ModuleNotFoundError"),
    ],
)
def test_a_file_that_is_no_recipe_is_answered_with_the_reason(folder: Path, text: str, message: str) -> None:
    (folder / "wrong.py").write_text(text)
    with pytest.raises(ConfigError) as caught:
        configuration("wrong.py", [])
    assert message in str(caught.value)


@pytest.mark.parametrize("word", ["absent.py", "absent.json"])
def test_a_file_that_is_not_there_is_named(word: str) -> None:
    with pytest.raises(ConfigError, match=rf"{word}: no such file"):
        configuration(word, [])


def test_the_overlapped_run_of_the_paper_differs_from_it_in_where_and_when_it_samples() -> None:
    overlapped, paper = (
        recipe(f"qwen3_30b_a3b_{kind}xh100").model_dump() for kind in ("overlap_48", "dapo_32")
    )
    assert {key for key in paper if overlapped[key] != paper[key]} == {"name", "layout", "rollout", "sync"}
    own = {key for key, value in paper["rollout"].items() if overlapped["rollout"][key] != value}
    assert own == {"placement", "staleness", "ranks_per_engine", "sglang"}
    assert overlapped["layout"] | {"data": 8, "engine_nodes": 0} == paper["layout"]
    assert overlapped["sync"] | {"transport": "ipc"} == paper["sync"]


def test_the_long_context_recipe_holds_a_sample_of_128k_tokens_in_one_pass_of_eight_ranks() -> None:
    config = recipe("qwen3_30b_a3b_longcontext_64xh100")
    assert config.batch.max_response_tokens == 128 * 1024 and config.layout.context == 8
    assert config.longest_trained_sample >= config.batch.max_prompt_tokens + 128 * 1024
    with pytest.raises(ConfigError, match=r"layout\.context=8 ranks; raise it to 16640"):
        override(config, ["batch.max_tokens_per_microbatch=16639"])


def test_an_unknown_recipe_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean tiny_moe_cpu"):
        configuration("tiny_mo_cpu", [])


@pytest.mark.parametrize(
    ("response", "reward"), [("so \\boxed{1200}", 1.0), ("so \\boxed{1,200}", 1.0), ("so \\boxed{12}", 0.0)]
)
def test_gsm8k_is_graded_by_what_its_solution_has_behind_the_hashes(response: str, reward: float) -> None:
    from recipes.qwen3_0_6b_gsm8k_1xh100 import score

    solution = "He sells 12 bags.\nThat is 12*100=$<<12*100=1200>>1200.\n#### 1,200"
    assert score(response, Problem(0, (), solution)) == reward
    assert score("Answer: 1200", Problem(0, (), solution)) == 1
    assert score("Answer: 1200", Problem(0, (), solution), truncated=True) == 0, "more digits may follow"


@pytest.mark.parametrize(
    ("was", "becomes", "bounds"),
    [("bf16", "fp32", (1e-5, 1e-4)), ("fp32", "bf16", (0.1, 2.0)), ("bf16", "bf16", (0.1, 2.0))],
)
def test_a_runs_config_json_has_the_bounds_of_the_precision_that_it_is_given(
    folder: Path, was: str, becomes: str, bounds: tuple[float, float]
) -> None:
    own = "sync.mean_log_prob_difference=0.05"
    for name, settings, mean in (("derived", [], bounds[0]), ("own", [own], 0.05)):
        written = configuration("tiny_moe_cpu", [f"model.precision={was}", *settings])
        (folder / f"{name}.json").write_text(json.dumps(written.model_dump(mode="json")))
        read = configuration(f"{name}.json", [f"model.precision={becomes}"]).sync
        assert (read.mean_log_prob_difference, read.p99_log_prob_difference) == (mean, bounds[1])
