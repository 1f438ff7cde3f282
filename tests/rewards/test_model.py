"""A reward model behind SGLang's /classify: what it is asked, and which servers are refused."""

from __future__ import annotations

import ast
import importlib.util
import runpy
from pathlib import Path

import pytest

from megatron_pmd.config import Reward, RewardModel
from megatron_pmd.data.problems import Problem
from megatron_pmd.errors import ConfigError, DataError, PmdError
from megatron_pmd.rewards import service as service_module
from megatron_pmd.rewards.grading import grading
from megatron_pmd.rewards.pool import Verdict
from tests.rewards.test_remote import Reply, service
from tests.test_tutorials import blocks

USER = {"role": "user", "content": "6 * 7?"}
PROBLEM = Problem(3, (USER,), "42")
TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} end {% endfor %}"
WORDS = ["user", "assistant", "6", "*", "7?", "42", "end", "thought"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model's folder without its weights: the server has them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = tmp_path_factory.mktemp("reward-model")
    plain = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="end"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(made)
    (made / "config.json").write_text('{"model_type": "llama"}')
    return made


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(service_module, "RETRY_PAUSE_SECONDS", 0.01)


INFO = {"is_generation": False, "architectures": ["LlamaForSequenceClassification"]}
"""Of what SGLang 0.5.23 answers to /model_info for a reward model."""


def scored(*outputs: float) -> Reply:
    """As SGLang 0.5.23 answers to /classify, recorded from a tiny reward model on a CPU."""
    meta = {"id": "31", "finish_reason": {"type": "length", "length": 0}, "prompt_tokens": 9}
    return 200, {"embedding": list(outputs), "meta_info": meta}


def reward(url: str, folder: Path) -> Reward:
    model = RewardModel(url=url.removesuffix("/grade") + "/", tokenizer=str(folder), retries=1)
    return Reward(name="model", model=model, timeout_seconds=5)


def test_the_server_gets_the_conversation_as_tokens_of_the_reward_models_own_template(folder):
    with service(lambda _: scored(-1.25), INFO) as (url, sent), grading(reward(url, folder)) as rewards:
        items = [("<think>thought</think>\n42", PROBLEM), ("42", PROBLEM), ("7? 42", PROBLEM)]
        assert rewards.grade(items) == [Verdict(-1.25)] * 3
    asked = sorted((body["input_ids"] for body in sent), key=len)
    # user 6 * 7? end assistant 42 end: once for two that are the same without their thoughts
    assert asked == [[0, 2, 3, 4, 6, 1, 5, 6], [0, 2, 3, 4, 6, 1, 4, 5, 6]]
    assert all(body.keys() == {"input_ids"} for body in sent)


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ((400, {"error": {"message": "The input (9000 tokens) is longer"}}), "answered HTTP 400"),
        ((200, {"embedding": ["x"]}), "the reward model gave no reward"),
        ((200, b'{"embedding": [NaN]}'), "the reward model gave nan"),
    ],
)
def test_what_is_wrong_with_one_sample_costs_that_sample(folder, reply, reason):
    with service(lambda _: reply, INFO) as (url, _), grading(reward(url, folder)) as rewards:
        verdict = rewards.submit("42", PROBLEM).result()
    assert verdict.reward == 0.0 and reason in str(verdict.error)


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (scored(0.1, 0.9), "has 2 outputs; one with a single output"),
        ((401, b"no"), "HTTP 401: no; .*correct the settings"),
        ((500, b"no"), "failed 2 times on problem 3; last failure: HTTP 500"),
    ],
)
def test_what_is_wrong_with_every_sample_ends_the_run(folder, reply, reason):
    with (
        service(lambda _: reply, INFO) as (url, _),
        grading(reward(url, folder)) as rewards,
        pytest.raises(PmdError, match=reason),
    ):
        rewards.submit("42", PROBLEM).result()


@pytest.mark.parametrize(
    ("info", "kind", "reason"),
    [
        ({"is_generation": True}, ConfigError, "serves a model that generates text; serve a sequence-class"),
        ({"object": "list"}, PmdError, "/model_info does not answer as SGLang's does: KeyError"),
        (b"<html>", PmdError, "does not answer as SGLang's does"),
    ],
)
def test_a_server_of_another_kind_is_refused_before_a_sample_is_graded(folder, info, kind, reason):
    with (
        service(lambda _: scored(1), info) as (url, sent),
        pytest.raises(kind, match=reason),
        grading(reward(url, folder)),
    ):
        pass
    assert not sent


def test_a_server_that_is_not_there_is_named(folder):
    nobody = reward("http://127.0.0.1:9/grade", folder)
    with pytest.raises(
        PmdError, match=r"http://127.0.0.1:9/model_info .*ConnectError.*is the server running"
    ):
        grading(nobody).__enter__()


def test_a_folder_without_a_chat_template_and_messages_that_it_refuses_are_named(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_text(file.read_text())
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match="has no chat template"):
        grading(reward("http://127.0.0.1:9/grade", tmp_path))
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('no system') }}")
    with (
        service(lambda _: scored(1), INFO) as (url, _),
        grading(reward(url, tmp_path)) as rewards,
        pytest.raises(DataError, match=r"problem 3: the reward model's chat template refuses .*no system"),
    ):
        rewards.submit("42", PROBLEM).result()


def test_the_pages_example_prints_the_scores(folder, tmp_path, monkeypatch, capsys):
    example = next(block for block in blocks("docs/judges.md") if block.title == "score.py")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "reward-model").symlink_to(folder)
    (tmp_path / example.title).write_text(example.text)
    monkeypatch.chdir(tmp_path)
    with service(lambda body: scored(len(body["input_ids"])), INFO, port=8908):
        runpy.run_path(example.title)
    assert capsys.readouterr().out == "16.0\n13.0\n"


def test_the_installed_sglang_has_the_endpoints_with_these_words():
    """Read, not imported: its modules take ten seconds. docs/judges.md tells of the real run."""
    spec = importlib.util.find_spec("sglang")
    assert spec is not None and spec.origin is not None
    source = Path(spec.origin).parent / "srt"
    requests, server = (
        ast.parse((source / file).read_text())
        for file in ("managers/io_struct.py", "entrypoints/http_server.py")
    )
    asked = next(n for n in ast.walk(requests) if getattr(n, "name", "") == "EmbeddingReqInput")
    assert "input_ids" in {ast.unparse(n.target) for n in ast.walk(asked) if isinstance(n, ast.AnnAssign)}
    routes = {
        node.name: ast.unparse(node) for node in ast.walk(server) if isinstance(node, ast.AsyncFunctionDef)
    }
    assert "'/classify'" in routes["classify_request"]
    assert "obj: EmbeddingReqInput" in routes["classify_request"]
    assert "'/model_info'" in routes["model_info"] and "'is_generation'" in routes["model_info"]
