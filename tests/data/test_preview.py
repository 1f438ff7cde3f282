"""`megatron-pmd data` shows what a run would read, with the numbers of the tokenizer itself."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_pmd.cli.main import app
from megatron_pmd.config import override
from megatron_pmd.errors import ConfigError, ModelError
from recipes import configuration
from tests.test_tutorials import blocks

ROWS = [{"question": "very " * n + "hard?", "gold": {"value": n}, "level": n} for n in (1, 2, 9)]
KEYS = ["data.train.prompt_key=question", "data.train.answer_key=gold.value"]


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture
def model(tmp_path, tokenizer) -> Path:
    folder = tmp_path / "model"
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "qwen3"}')
    return folder


def shown(*arguments) -> str:
    result = CliRunner().invoke(app, ["data", *map(str, arguments)], catch_exceptions=False)
    return result.output


def test_counts_drops_lengths_and_the_templates_words_are_shown(file, model, tokenizer):
    chats = [[{"role": "user", "content": row["question"]}] for row in ROWS]
    texts = [tokenizer.apply_chat_template(c, add_generation_prompt=True, tokenize=False) for c in chats]
    lengths = [len(tokenizer.encode(text)) for text in texts]
    limit = lengths[1]
    output = shown(file, *KEYS, "--model", model, "--max-prompt-tokens", limit, "--first", 1)
    assert f"{file}: 3 problems" in output
    assert (
        f"dropped: 1 problems over batch.max_prompt_tokens={limit} (the longest has {lengths[2]} " in output
    )
    assert f"tokens of a prompt: {lengths[0]} to {lengths[1]}; " in output
    assert f"--- problem 0, answer '1'\nfurther columns, for the reward: gold, level\n{texts[0]}\n" in output
    assert "problem 1," not in output and texts[1] not in output


def test_without_a_model_the_messages_are_shown(file):
    output = shown(file, *KEYS, 'data.system_prompt="Be brief."')
    assert "--- problem 1, answer '2'" in output and "system: Be brief.\nuser: very very hard?" in output
    assert "no model is given" in output


def test_a_recipe_shows_each_of_its_sources(file, model):
    settings = ["data.train.kind=file", f"data.train.path={file}", f"model.path={model}"]
    output = shown(
        "tiny_moe_cpu",
        *settings,
        *KEYS,
        "data.evaluation=null",
        "batch.max_prompt_tokens=65",
        "batch.max_tokens_per_microbatch=99",
    )
    assert "=== data.train\n" in output and "1 problems over batch.max_prompt_tokens=65" in output


def test_a_setting_of_something_else_and_a_folder_that_is_no_model_are_refused(file, tmp_path):
    with pytest.raises(ConfigError, match=r"optimizer is not a setting"):
        shown(file, "optimizer.learning_rate=1")
    for content, error, message in (
        (None, ModelError, r"no config\.json there; give the folder of a Hugging Face model"),
        (b'{"model_type": "\xff"}', ModelError, r"config\.json: not JSON: 'utf-8'"),
        (b"{}", ModelError, r"no tokenizer there; copy tokenizer\.json"),
    ):
        if content:
            (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(error, match=message):
            shown(file, *KEYS, "--model", tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="the tokenizer cannot be loaded"):
        shown(file, *KEYS, "--model", tmp_path)


def test_a_mixture_shows_each_source_with_its_share_and_what_it_has_of_its_own(file):
    keys = {"kind": "file", "path": str(file), "prompt_key": "question", "answer_key": "gold.value"}
    own = {"reward": {"name": "math"}, "tau": 0.3, "max_response_tokens": 4, "system_prompt": "Be brief."}
    train = [{"name": "plain", "source": keys, "weight": 3}, {"name": "brief", "source": keys, **own}]
    output = shown(
        "tiny_moe_cpu", f"data.train={json.dumps(train)}",
        f"data.evaluation={json.dumps([{'name': 'held', 'source': keys}])}", "--first", 1,
    )  # fmt: skip
    assert "=== data.train.0: plain, 75.0% of the prompts, reward exact\n" in output
    headline = (
        "=== data.train.1: brief, 25.0% of the prompts, reward math, τ 0.3, responses of at most 4 tokens"
    )
    assert f"{headline}\n" in output
    assert "=== data.evaluation.0: held, reward exact\n" in output
    assert output.count(f"{file}: 3 problems") == 3
    assert output.count("system: Be brief.\nuser: very hard?") == 1


def test_the_page_on_mixtures_shows_what_its_commands_print(tmp_path, monkeypatch):
    """Its recipe and its two commands, as they stand there."""
    written = blocks("docs/mixtures.md")
    recipe, look, expected, changed = written[:4]
    (tmp_path / recipe.title).write_text(recipe.text)
    monkeypatch.chdir(tmp_path)
    output, other = (shown(*block.text.split()[2:]) for block in (look, changed))
    lines = [line for line in output.splitlines() if not line.startswith("no model is given")]
    assert lines == expected.text.splitlines()
    assert (
        "words, 83.3% of the prompts" in other
        and "sums, 16.7% of the prompts, reward reasoning_gym, τ 0.1" in other
    )
    as_json = next(block.text for block in written if block.language == "json")
    mixed = override(configuration("tiny_moe_cpu", []), [f"data.train={as_json}"])
    assert [(s.name, s.weight) for s in mixed.problem_sources("train")] == [("math", 3), ("words", 1)]
