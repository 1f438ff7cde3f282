"""Starts of a Slurm job: what is on the disk, a Slurm that does not answer, the host's own Python."""

from __future__ import annotations

import ast
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_pmd.launch.history import History, append
from megatron_pmd.node import job as job_module
from megatron_pmd.node.job import main
from megatron_pmd.node.restarts import is_restart
from megatron_pmd.outcome import RunOutcome, Status
from tests.node.played_slurm import Played, Start

PROJECT = Path(__file__).parents[2]
FAILED = RunOutcome(Status.FAILED, "n2: engine 1 died", "EngineError")
SAVED = RunOutcome(Status.SAVED, "told to save (SIGUSR1)")


def test_a_fresh_folder_gets_its_first_attempt(played: Played, start: Start) -> None:
    found = start.begin()
    noon = time.mktime(time.strptime("2026-05-01 12:00:00", "%Y-%m-%d %H:%M:%S"))
    assert found == {
        "PMD_ATTEMPT": "1",
        "PMD_STATE": str(played.state),
        "PMD_NODES": "n1 n2",
        "PMD_END_TIME": str(int(noon)),
        "MASTER_ADDR": "n1",
        "MASTER_PORT": "20005",
    }
    assert (played.state / "jobs").read_text() == "5\n"
    assert (played.state / "log").read_text() == "/shared/my runs/log.out\n"
    assert start.log == (
        "megatron-pmd: attempt 1, job 5, nodes n1 n2, rendezvous n1:20005, ends 2026-05-01T12:00:00, "
        "from the start\n"
    )
    assert (played.run / "logs").is_dir()


def test_the_jobs_of_a_launched_chain_stay_listed(played: Played, start: Start) -> None:
    played.state.mkdir(parents=True)
    (played.state / "jobs").write_text("5\n6\n")
    start.begin()
    assert (played.state / "jobs").read_text() == "5\n6\n"


@pytest.mark.parametrize(
    ("submitted", "restart_count", "restart"),
    [(["5"], 0, False), (["5"], 1, True), (["5"], 2, True), ([], 1, False), (["4"], 1, False)],
)
def test_a_job_is_a_restart_when_slurm_says_so_and_it_has_been_here(
    submitted: Sequence[str], restart_count: int, restart: bool
) -> None:
    """Slurm calls a job restarted whose first start it lost: the script has not been there."""
    assert is_restart(History(jobs=frozenset(submitted)), "5", restart_count) is restart


def test_a_job_of_a_chain_whose_first_start_slurm_lost_still_ends_with_the_run(
    played: Played, start: Start
) -> None:
    start.begin()
    played.written(RunOutcome(Status.COMPLETE))
    start.end(0)
    assert start.begin(job=6, restarts=1, link=1) == {"exit": "0"}


def test_reports_of_a_start_that_the_history_does_not_know_are_removed(played: Played, start: Start) -> None:
    (played.state / "preflight" / "1").mkdir(parents=True)
    (played.state / "preflight" / "1" / "0.json").write_text("{}")
    start.begin()
    assert not (played.state / "preflight" / "1").exists()


def test_a_port_that_another_job_has_is_not_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = server.getsockname()[1]
        assert job_module.free_port("127.0.0.1", taken) > taken
    assert job_module.free_port("127.0.0.1", taken) == taken


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("PMD_MAX_CRASHES", "three", "PMD_MAX_CRASHES=three is not a whole number"),
        ("SLURM_JOB_ID", None, "SLURM_JOB_ID is not set"),
    ],
)
def test_a_variable_that_is_wrong_is_refused(
    played: Played, start: Start, name: str, value: str | None, words: str
) -> None:
    start.monkeypatch.delenv(name, raising=False)
    if value:
        start.monkeypatch.setenv(name, value)
    assert main(["begin"]) == 2
    assert words in start.capsys.readouterr().err


def test_a_line_that_was_cut_off_is_not_counted_and_does_not_spoil_the_next(
    played: Played, start: Start
) -> None:
    start.begin()
    path = played.state / "history.jsonl"
    with path.open("a") as file:
        file.write('{"event": "ended", "attempt": 1, "sta')
    assert start.begin(restarts=1)["PMD_ATTEMPT"] == "2"
    assert f"1 line(s) of {path} cannot be read; they are not counted" in start.log
    assert played.outcomes() == ["failed", None]
    assert played.history().unreadable == 1


@pytest.mark.parametrize(
    "line",
    ["", "\0\0\0", "[1, 2]", "3", '{"event": "begun"}', '{"event": "unknown"}', '{"attempt": 2}', "\udcff",
     '{"event": "ended", "attempt": 1, "status": "fine", "reason": "", "error": null}'],
)  # fmt: skip
def test_a_line_without_meaning_is_passed_over(tmp_path: Path, line: str) -> None:
    path = tmp_path / "history.jsonl"
    append(path, "submitted", job="5")
    with path.open("ab") as file:
        file.write(line.encode(errors="surrogateescape") + b"\n")
    append(path, "begun", attempt=1, job="5", nodes="n1", checkpoint=None)
    history = History.read(path)
    assert (history.unreadable, len(history.attempts), history.jobs) == (1, 1, {"5"})


@pytest.mark.parametrize("text", ["", "{", "[]", '{"status": "fine"}', '{"reason": "x"}'])
def test_an_outcome_that_cannot_be_read_is_as_none_at_all(played: Played, start: Start, text: str) -> None:
    start.begin()
    (played.state / "outcome.json").write_text(text)
    assert start.end(9) == 1
    assert "the job step ended with exit code 9" in start.log
    assert RunOutcome.read(played.state / "outcome.json") == RunOutcome(
        Status.FAILED, "the job step ended with exit code 9"
    )


def test_an_unwritable_folder_is_told_in_one_line(played: Played, start: Start) -> None:
    played.run.parent.mkdir()
    played.run.write_text("a file where the run's folder should be")
    assert main(["begin"]) == 1
    assert start.capsys.readouterr().err.startswith("megatron-pmd: ")


def test_without_an_answer_about_its_nodes_the_job_is_requeued_all_the_same(
    played: Played, start: Start
) -> None:
    start.monkeypatch.setattr(job_module, "QUESTION_SECONDS", 0.2)
    start.begin()
    played.program("sinfo", "exec sleep 60")
    played.written(FAILED)
    assert start.end(1) == 1
    assert "no answer within 0.2 s; no node is left out for its state in Slurm" in start.log
    assert played.calls("requeue") == ["requeue 5"]


def test_without_an_answer_about_the_job_it_starts_and_knows_no_end(played: Played, start: Start) -> None:
    start.monkeypatch.setattr(job_module, "QUESTION_SECONDS", 0.2)
    played.program("scontrol", 'case "$2" in hostnames) echo n1 ;; *) exec sleep 60 ;; esac')
    assert start.begin()["PMD_END_TIME"] == "0"
    assert "ends at a time that Slurm did not say" in start.log


def test_a_job_without_an_end_runs(played: Played, start: Start) -> None:
    played.job_state("RUNNING", end="Unknown")
    assert start.begin()["PMD_END_TIME"] == "0"


def test_a_requeue_without_an_answer_is_told(played: Played, start: Start) -> None:
    start.monkeypatch.setattr(job_module, "REQUEUE_SECONDS", 0.2)
    start.begin()
    played.program("scontrol", '[ "$1" != requeue ] || exec sleep 60')
    played.written(SAVED)
    assert start.end(0) == 1
    assert "scontrol requeue 5: no answer within 0.2 s" in str(played.history().not_requeued)


def test_without_slurms_commands_nothing_starts_and_nothing_is_counted(played: Played, start: Start) -> None:
    start.monkeypatch.setenv("PATH", "/nonexistent")
    assert main(["begin"]) == 1
    assert "scontrol is not here" in start.capsys.readouterr().err
    assert played.history() == History()


def host_python() -> str:
    """The oldest on this machine that the batch script takes."""
    found: dict[tuple[int, int], str] = {sys.version_info[:2]: sys.executable}
    for path in [*Path.home().glob(".pyenv/versions/*/bin/python3"), Path("/usr/bin/python3")]:
        asked = subprocess.run(
            [path, "-c", "import sys; print(*sys.version_info[:2])"], capture_output=True, text=True
        )
        if asked.returncode == 0:
            major, minor = asked.stdout.split()
            found[int(major), int(minor)] = str(path)
    return found[min(version for version in found if version >= (3, 9))]


def test_it_runs_with_the_oldest_python_it_asks_for_and_its_library_alone(played: Played) -> None:
    """-S: no site-packages. Also checks the syntax of 3.9 where no such Python is here."""
    program = (
        "import sys; from megatron_pmd.node import job; code = job.main(['begin']); "
        "print(*(m.__file__ for n, m in sys.modules.items() if n.startswith('megatron_pmd'))); sys.exit(code)"
    )
    done = subprocess.run(
        [host_python(), "-S", "-c", program], cwd=PROJECT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    *variables, files = done.stdout.splitlines()
    assert "export PMD_ATTEMPT=1" in variables
    assert "node/restarts.py" in files and "launch/history.py" in files
    for file in files.split():
        ast.parse(Path(file).read_text(), feature_version=(3, 9))
    module = [host_python(), "-S", "-m", "megatron_pmd.node.job", "end", "3"]
    done = subprocess.run(
        module, cwd=PROJECT, env=os.environ | {"PMD_ATTEMPT": "1"}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1, done.stderr
    assert played.calls("requeue") == ["requeue 5"]
    assert "the job step ended with exit code 3" in done.stderr
