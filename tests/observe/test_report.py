"""The report's content; that its scripts run is tested in test_report_page.py."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from plotly.offline import get_plotlyjs

from megatron_pmd.errors import DataError
from megatron_pmd.observe.journal import Journal
from megatron_pmd.observe.report import write_report
from megatron_pmd.observe.samples import evenly
from megatron_pmd.outcome import RunOutcome, Status
from megatron_pmd.rollout_file import write_rollout
from tests.observe.synthetic_run import (
    HOSTILE,
    log_evaluation,
    log_iteration,
    make_config,
    make_samples,
    run_iterations,
)


def page_of(folder: Path) -> str:
    """The report without the library."""
    page = write_report(folder).read_text()
    assert page.count(get_plotlyjs()) == 1
    return page.replace(get_plotlyjs(), "")


def data_of(page: str) -> dict[str, Any]:
    (text,) = re.findall(r'<script type="application/json" id="page-data">(.*?)</script>', page, re.DOTALL)
    data: dict[str, Any] = json.loads(text)
    return data


def test_the_page_holds_what_was_logged(make_run):
    page = page_of(make_run())
    data = data_of(page)
    assert data["charts"]["curve-0"]["data"][0]["y"] == pytest.approx([0.2 + 0.06 * t for t in range(6)])
    assert data["charts"]["curve-0"]["data"][1]["x"] == [0, 3, 6]
    assert [e["iteration"] for e in data["samples"]["rollouts"]] == list(range(6))
    assert [e["iteration"] for e in data["samples"]["evaluations"]] == [0, 3, 6]
    prompt = data["samples"]["rollouts"][5]["prompts"][0]
    assert prompt["answer"] == "17"
    assert {r["version"] for r in prompt["responses"]} == {5}
    assert {r["finish"] for r in prompt["responses"]} == {"stop", "length"}
    assert {r["tokens"] for r in prompt["responses"]} == {40, 41, 42, 43}
    for shown in ("optimizer.learning_rate", "1e-05", "packages.torch", "9.60 GB", "evaluate"):
        assert shown in page, shown


def test_the_page_asks_nothing_of_the_network(make_run):
    page = page_of(make_run())
    assert "default-src 'none'" in page
    assert not re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=", page)
    assert "@import" not in page
    assert "url(" not in page


def test_text_of_a_run_stays_text(tmp_path):
    config = make_config(data={"train": {"kind": "file", "path": "<img src=x onerror=alert(1)>.jsonl"}})
    journal = Journal.open(tmp_path / "run", config, 0)
    run_iterations(journal, 0, 2, extra=HOSTILE)
    journal.finish(RunOutcome(Status.FAILED, HOSTILE, "EngineError"))
    page = page_of(tmp_path / "run")
    assert "<img" not in page
    assert 'document.title="owned"' not in page
    assert page.count("<script") == page.count("</script") == 3
    assert data_of(page)["samples"]["rollouts"][0]["prompts"][0]["responses"][0]["text"].endswith(HOSTILE)


def test_an_unfinished_run_has_a_report_also_in_its_first_iteration(tmp_path):
    journal = Journal.open(tmp_path / "run", make_config(), 0)
    assert "unfinished" in page_of(tmp_path / "run")
    with journal.phase("rollout"):
        write_rollout(tmp_path / "run/rollouts/0.parquet", make_samples(0), 0)
    data = data_of(page_of(tmp_path / "run"))
    journal.close()
    assert [e["iteration"] for e in data["samples"]["rollouts"]] == [0]
    assert list(data["charts"]) == ["phases"]


def test_a_run_without_evaluation_has_a_report(tmp_path):
    journal = Journal.open(tmp_path / "run", make_config(), 0)
    journal.iteration(0)
    log_iteration(journal, 0)
    journal.finish(RunOutcome(Status.STOPPED))
    data = data_of(page_of(tmp_path / "run"))
    assert data["samples"]["evaluations"] == []
    assert len(data["charts"]["curve-0"]["data"]) == 1


def test_a_resumed_run_shows_each_iteration_once_and_no_samples_from_before(tmp_path):
    config = make_config()
    journal = Journal.open(tmp_path / "run", config, 0)
    run_iterations(journal, 0, 5)
    journal.close()
    journal = Journal.open(tmp_path / "run", config, 2)
    run_iterations(journal, 2, 3)
    journal.close()
    data = data_of(page_of(tmp_path / "run"))
    assert data["charts"]["curve-0"]["data"][0]["x"] == [0, 1, 2]
    # iteration 3 is under way: its file is replaced at once; 4 belongs to what was dropped
    assert [e["iteration"] for e in data["samples"]["rollouts"]] == [0, 1, 2, 3]


def test_values_that_were_not_finite_are_gaps_and_counted(tmp_path):
    journal = Journal.open(tmp_path / "run", make_config(), 0)
    for n, loss in enumerate((1.0, float("nan"), 0.5)):
        journal.log("step", {"step": n, "global_step": n, "loss": loss})
    journal.close()
    page = page_of(tmp_path / "run")
    assert "1 value was not finite" in page
    assert data_of(page)["charts"]["curve-0"]["data"][0]["y"] == [1.0, None, 0.5]


def test_a_metric_nobody_foresaw_is_shown(tmp_path):
    journal = Journal.open(tmp_path / "run", make_config(), 0)
    journal.log("iteration", {"reward": 0.5, "router/entropy": 1.25})
    journal.close()
    page = page_of(tmp_path / "run")
    assert "router/entropy" in page
    assert data_of(page)["charts"]["other-0"]["data"][0]["y"] == [1.25]


def test_a_long_run_with_long_responses_makes_a_small_page(tmp_path):
    """60 iterations of 2 MB of responses each: the page keeps 40 iterations, first and last among them."""
    journal = Journal.open(tmp_path / "run", make_config(iterations=60), 0)
    samples = make_samples(0, groups=10, per_group=10, extra="x" * 20_000)
    for t in range(60):
        journal.iteration(t)
        journal.log("iteration", {"reward": 0.5})
        write_rollout(tmp_path / f"run/rollouts/{t}.parquet", samples, t)
    journal.close()
    page = page_of(tmp_path / "run")
    rollouts = data_of(page)["samples"]["rollouts"]
    assert len(page) < 10_000_000
    assert len(rollouts) == 40
    assert (rollouts[0]["iteration"], rollouts[-1]["iteration"]) == (0, 59)
    assert len(rollouts[0]["prompts"]) == 8
    text = rollouts[0]["prompts"][0]["responses"][0]["text"]
    assert text.startswith("First 10 + 7")
    assert "characters left out" in text


def test_the_responses_kept_span_the_rewards(tmp_path):
    journal = Journal.open(tmp_path / "run", make_config(), 0)
    samples = make_samples(0, groups=1, per_group=32)
    for sample in samples:
        sample.reward = float(sample.number == 17)
    write_rollout(tmp_path / "run/rollouts/0.parquet", samples, 0)
    journal.close()
    (prompt,) = data_of(page_of(tmp_path / "run"))["samples"]["rollouts"][0]["prompts"]
    assert prompt["samples"] == 32
    assert [r["reward"] for r in prompt["responses"]] == [1.0] + [0.0] * 7


def test_evaluations_keep_the_same_problems(tmp_path):
    journal = Journal.open(tmp_path / "run", make_config(), 0)
    for t in (0, 1):
        journal.iteration(t)
        log_evaluation(journal, t)
        log_iteration(journal, t)
    journal.close()
    first, last = data_of(page_of(tmp_path / "run"))["samples"]["evaluations"]
    problems = [p["problem"] for p in first["prompts"]]
    assert len(problems) == 8
    assert problems == [p["problem"] for p in last["prompts"]]


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no config\.json in it"):
        write_report(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        write_report(tmp_path / "absent")


@pytest.mark.parametrize(
    ("count", "expected"), [(1, [0]), (2, [0, 9]), (4, [0, 3, 6, 9]), (20, list(range(10)))]
)
def test_evenly_keeps_first_and_last(count, expected):
    assert evenly(range(10), count) == expected


def test_a_mixture_has_a_curve_for_each_source_and_its_samples_say_which(tmp_path):
    gym = {"kind": "reasoning_gym", "task": "chain_sum", "size": 9}
    train = [{"name": name, "source": gym, "weight": weight} for name, weight in (("sums", 2), ("words", 1))]
    journal = Journal.open(tmp_path / "run", make_config(data={"train": train}), 0)
    for t in range(2):
        journal.iteration(t)
        values = {f"source/{name}/reward": 0.1 * t + x for name, x in (("sums", 0.25), ("words", 0.5))}
        journal.log("evaluation", {"k": 1, "mean_at_k": 0.5, "source/sums/mean_at_k": 0.75 + t})
        journal.log("iteration", {"reward": 0.3} | values)
        samples = make_samples(t, groups=2)
        for sample in samples:
            sample.source = ("sums", "words")[sample.group]
        write_rollout(tmp_path / f"run/rollouts/{t}.parquet", samples, t)
    journal.close()
    page = page_of(tmp_path / "run")
    curves = {
        c["name"]: c["y"]
        for chart in data_of(page)["charts"].values()
        for c in chart["data"]
        if c.get("marker", {}).get("symbol") == "circle"
    }
    assert curves["sums"] == pytest.approx([0.25, 0.35]) and curves["words"] == pytest.approx([0.5, 0.6])
    assert [0.75, 1.75] in [c["y"] for chart in data_of(page)["charts"].values() for c in chart["data"]]
    assert "Reward by source" in page and "Evaluation by source" in page
    assert "other-0" not in data_of(page)["charts"], "no chart shows what another does"
    assert "data.train.1.weight" in page
    prompts = data_of(page)["samples"]["rollouts"][1]["prompts"]
    assert [prompt["problem"] for prompt in prompts] == ["sums 100", "words 101"]
