"""What a start is refused for before it has written anything."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_pmd.config import RunConfig, override
from megatron_pmd.errors import ConfigError, DataError, MissingPackage, ModelError, PmdError
from megatron_pmd.node.inputs import check_inputs
from megatron_pmd.node.ranks import run_here
from recipes import recipe

FILE = 'data.train={"kind": "file", "path": "train.jsonl", "prompt_key": "question", "answer_key": "answer"}'

GOOD = [{"question": "2 + 2", "answer": "4"}]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RunConfig]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):  # run_here sets them: taken back at the end
        monkeypatch.setenv(name, "lo")
    return lambda *settings: override(recipe("tiny_moe_cpu"), ["name=x", FILE, *settings])


@pytest.mark.parametrize(
    ("lines", "settings", "error", "message"),
    [
        (None, [], DataError, "train.jsonl: no such file"),
        ([], [], DataError, "train.jsonl: the file holds no problems"),
        ([{"prompt": "2 + 2", "answer": "4"}], [], DataError, "train.jsonl:1: no key 'question'"),
        (GOOD, ["model.path=model"], ModelError, "no config.json there"),
        (GOOD, ["reward.name=mine.py:f"], ConfigError, "mine.py: no such file"),
        (GOOD, ["reward.name=a.b:f"], ConfigError, "reward.name='a.b:f': there is no module a.b"),
        (GOOD, ["rollout.function=turns:f"], ConfigError, "there is no module turns"),
    ],
)
def test_the_name_of_a_start_that_is_refused_can_be_used_again(
    config: Callable[..., RunConfig],
    tmp_path: Path,
    lines: list[dict[str, str]] | None,
    settings: list[str],
    error: type[PmdError],
    message: str,
) -> None:
    if lines is not None:
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(error) as refused:
        run_here(config(*settings), tmp_path / "runs" / "x")
    assert message in str(refused.value) and refused.value.refuses
    assert [path.name for path in (tmp_path / "runs" / "x").iterdir()] == ["lock"]


def test_programs_are_graded_only_where_there_is_a_sandbox(
    config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "train.jsonl").write_text(json.dumps(GOOD[0]))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MissingPackage, match="install the package bubblewrap"):
        check_inputs(config("reward.name=code"), None)
    check_inputs(config("reward.name=remote", "reward.remote.url=http://here/"), None)
