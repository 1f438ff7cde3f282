from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_pmd import errors
from megatron_pmd.outcome import EXIT_CODES, RunEnds, RunOutcome, Status

PROJECT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "failure, status",
    [
        (errors.ConfigError("x"), Status.REFUSED),
        (errors.LayoutError("x"), Status.REFUSED),
        (errors.DataError("x"), Status.REFUSED),
        (errors.ModelError("x"), Status.REFUSED),
        (errors.EngineError("x"), Status.FAILED),
        (errors.StaleWeights("x"), Status.FAILED),
        (errors.NonFiniteLoss("x"), Status.FAILED),
        (errors.CheckpointError("x"), Status.FAILED),
        (ValueError("x"), Status.FAILED),
        (MemoryError(), Status.FAILED),
        (KeyboardInterrupt(), Status.INTERRUPTED),
        (errors.Interrupted("x"), Status.INTERRUPTED),
        (RunEnds(RunOutcome(Status.SAVED, "time is up")), Status.SAVED),
    ],
)
def test_what_ended_a_run_becomes_one_word(failure: BaseException, status: Status) -> None:
    assert RunOutcome.of(failure).status is status


def test_only_what_another_start_could_mend_is_started_again() -> None:
    assert [status for status in Status if RunOutcome(status).may_start_again] == [
        Status.SAVED,
        Status.FAILED,
    ]


def test_the_shell_can_tell_the_outcomes_apart() -> None:
    """0 is success; 75 is EX_TEMPFAIL of sysexits.h; 130 is a shell's own for Ctrl-C (128 + SIGINT)."""
    assert {s.value: code for s, code in EXIT_CODES.items()} == {
        "complete": 0, "stopped": 0, "failed": 1, "refused": 2, "alarmed": 3, "saved": 75, "interrupted": 130,
    }  # fmt: skip


def test_an_outcome_is_the_same_after_a_file_and_its_error_is_a_class_again(tmp_path: Path) -> None:
    written = RunOutcome.of(errors.LayoutError("12 ranks cannot hold tensor=8"))
    written.write(tmp_path / "outcome.json")
    assert RunOutcome.read(tmp_path / "outcome.json") == written
    assert issubclass(getattr(errors, str(written.error)), errors.ConfigError)
    assert RunOutcome.read(tmp_path / "none.json") is None


def test_it_is_read_with_nothing_but_pythons_own_library() -> None:
    """-S: no site-packages, as with the interpreter of a compute node."""
    code = "import megatron_pmd.outcome as o; print(o.RunOutcome(o.Status.SAVED).exit_code)"
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=PROJECT, capture_output=True, text=True)
    assert done.stdout == "75\n", done.stderr
