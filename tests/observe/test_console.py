"""The terminal: what is said, that it fits, and that nothing a model says can steer it."""

from __future__ import annotations

import io
import unicodedata

import pytest

from megatron_pmd.observe.console import Console
from megatron_pmd.observe.journal import Journal
from megatron_pmd.observe.quantities import duration, number, printable, size
from megatron_pmd.observe.report import write_report
from megatron_pmd.outcome import RunOutcome, Status
from tests.observe.synthetic_run import HOSTILE, log_evaluation, log_iteration, make_config


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def controls(text: str) -> set[str]:
    return {c for c in text if c != "\n" and unicodedata.category(c) == "Cc"}


def test_the_opening_works_the_batch_arithmetic_out():
    """64 = 16 x 4. A micro-batch of 4,096 tokens holds 4 of the longest samples; each of the 2
    replicas gets 8 of a step's 16 samples: at most 2 micro-batches."""
    out = io.StringIO()
    Console(out, width=100).opening(make_config())
    said = out.getvalue()
    assert "16 prompts x 4 = 64 samples" in said
    assert "4 steps of 4 prompts = 16 samples" in said
    assert "6 iterations = 24 steps, 384 samples" in said
    assert "256 prompt + 768 response = 1,024 tokens" in said
    assert "at least 4 samples; at most 2 of them" in said
    assert "tensor 2 x pipeline 1 x data 2 = 4" in said
    assert "expert 2 x expert_tensor 1: 2 replicas" in said


@pytest.mark.parametrize("width", [60, 80, 100])
def test_the_table_of_an_iteration_fits_and_holds_everything(tmp_path, width):
    journal = Journal.open(tmp_path / "run", make_config(), 0)
    journal.iteration(3)
    with journal.phase("evaluate"):
        log_evaluation(journal, 3)
    log_iteration(journal, 3)
    out = io.StringIO()
    Console(out, width=width).iteration(journal.record())
    journal.close()
    said = out.getvalue()
    assert max(len(line) for line in said.splitlines()) <= width
    assert "…" not in said
    for word in (
        "reward",
        "0.380",
        "evaluation",
        "KL to anchor",
        "0.018",
        "PMD progress",
        "5.0e-06",
        "1.60 GB",
        "25 %",
    ):
        assert word in said, word
    for phase in ("evaluate", "rollout", "release", "anchor", "update", "save", "sync", "resume"):
        assert phase in said, phase


def test_an_iteration_with_nothing_logged_is_still_printed(tmp_path):
    journal = Journal.open(tmp_path / "run", make_config(), 0)
    out = io.StringIO()
    Console(out).iteration(journal.record())
    journal.close()
    assert "iteration 0" in out.getvalue()


def test_without_a_terminal_progress_is_ten_plain_lines(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    out = io.StringIO()
    console = Console(out)
    with console.progress("rollout", 8192) as advance:
        for _ in range(8192):
            advance()
    said = out.getvalue().splitlines()
    assert len(said) == 10
    assert said[0] == "rollout: 820 of 8,192"
    assert said[-1] == "rollout: 8,192 of 8,192"
    assert not controls(out.getvalue())


def test_progress_by_large_strides_says_each_stride_once():
    out = io.StringIO()
    with Console(out).progress("update", 3) as advance:
        for _ in range(3):
            advance()
    assert out.getvalue().splitlines() == ["update: 1 of 3", "update: 2 of 3", "update: 3 of 3"]


def test_in_a_terminal_progress_is_a_bar(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    out = Terminal()
    with Console(out, width=80).progress("rollout", 10) as advance:
        advance(10)
    assert "10/10" in out.getvalue()
    assert "\x1b[" in out.getvalue()


def test_the_closing_compares_the_same_prompt_and_names_the_report(make_run):
    folder = make_run()
    out = io.StringIO()
    Console(out, width=80).closing(folder, write_report(folder))
    said = out.getvalue()
    assert "0.200 first, 0.500 last" in said
    assert "0.200 at the start, 0.560 after 6 iterations" in said
    assert "at the start · reward 0" in said
    assert "after 6 iterations · reward 1.00" in said
    assert f"report: {folder / 'report.html'}" in said


def test_a_response_cannot_steer_the_terminal(make_run):
    folder = make_run(extra=HOSTILE)
    out = io.StringIO()
    Console(out, width=80).closing(folder)
    assert not controls(out.getvalue())
    assert "[bold]markup[/bold]" in out.getvalue().replace("\n", "")
    assert printable("a\x1b]0;title\x07b\u202ec\nd") == "a\ufffd]0;title\ufffdb\ufffdc\nd"


def test_the_closing_of_a_failed_run_without_evaluation_says_why(tmp_path):
    journal = Journal.open(tmp_path / "run", make_config(), 0)
    journal.finish(RunOutcome(Status.FAILED, "engine 3 serves version 41, expected 42", "StaleWeights"))
    out = io.StringIO()
    Console(out).closing(tmp_path / "run")
    assert "failed" in out.getvalue()
    assert "expected 42" in out.getvalue()


def test_a_terminal_that_cannot_show_greek_does_not_stop_the_run():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    Console(stream).opening(make_config())
    stream.flush()
    assert b"objective" in raw.getvalue()


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (number(0.123456), "0.123"),
        (number(1.2345e-6), "1.2e-06"),
        (number(81234.6), "81,235"),
        (number(None), "–"),
        (duration(7.126), "7.13 s"),
        (duration(245), "4 min 05 s"),
        (duration(3599.7), "1 h 00 min"),
        (duration(12_000), "3 h 20 min"),
        (size(270_000_000), "270 MB"),
        (size(0), "0 B"),
    ],
)
def test_quantities_read_well(shown, expected):
    assert shown == expected
