"""What is told of jobs when Slurm answers, and when it does not; what a job gets of its submitter's shell."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from unittest import mock

import pytest
from typer.testing import CliRunner

from megatron_pmd.cli.main import app, main
from megatron_pmd.errors import LaunchError
from megatron_pmd.launch.cluster import load_cluster
from megatron_pmd.launch.progress import follow_log
from megatron_pmd.launch.script import job_for
from megatron_pmd.launch.submit import cancel, is_queued, submit
from recipes import recipe

# the words of Slurm's own library; its commands then end with 1
UNKNOWN = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
SILENT = [
    "echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2; exit 1",
    "echo 'squeue: fatal: Could not establish a configuration source' >&2; exit 1",
    "echo 'slurm_load_jobs error: Zero Bytes were transmitted or received' >&2; exit 1",
]

Play = Callable[[str, str], None]


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Play:
    """Puts a program of Slurm's name before the machine's own."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def program(name: str, text: str) -> None:
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)

    return program


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run that was submitted as job 5."""
    folder = tmp_path / "runs" / "tiny_moe_cpu"
    (folder / "launch").mkdir(parents=True)
    (folder / "logs").mkdir()
    (folder / "launch" / "jobs").write_text("5\n")
    (folder / "launch" / "log").write_text(f"{folder}/logs/log-slurm-5.out\n")
    return folder


@pytest.mark.parametrize("silent", SILENT)
def test_no_answer_of_slurm_is_not_taken_for_no_job(play: Play, run: Path, silent: str) -> None:
    play("squeue", silent)
    play("sbatch", "echo 6")
    job = job_for(recipe("tiny_moe_cpu"), load_cluster("lab"), PurePosixPath(run.parents[1]))
    for command in (lambda: cancel(run), lambda: submit(job, through="sbatch")):
        with pytest.raises(LaunchError, match=r"whether there is a job 5 is not known: squeue .*: \w+"):
            command()
    assert (run / "launch" / "jobs").read_text() == "5\n"


def test_status_tells_the_rest_and_fails_when_slurm_does_not_answer(
    play: Play, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    play("squeue", SILENT[0])
    with pytest.raises(SystemExit) as ended:
        main(lambda: app(["status", str(run)], standalone_mode=False))
    said = capsys.readouterr()
    assert f"{run}: 0 of ? iterations\njob 5: unknown, Slurm does not answer\n" in said.out
    assert ended.value.code == 1 and "Unable to contact slurm controller" in said.err


def test_a_job_that_slurm_has_forgotten_is_not_there(play: Play, run: Path) -> None:
    play("squeue", UNKNOWN)
    assert not is_queued("5") and cancel(run) == []
    assert "job 5: no longer known to Slurm" in CliRunner().invoke(app, ["status", str(run)]).output


def test_a_log_is_followed_while_the_controller_is_started_again(play: Play, run: Path) -> None:
    (run / "logs" / "log-slurm-5.out").write_text("first\n")
    play("squeue", f"[ -e {run}/asked ] && {{ {UNKNOWN}; }}; touch {run}/asked; {SILENT[0]}")
    lines: Iterator[str] = follow_log(run, 10, follow=True)
    assert list(lines) == ["first\n"]
    assert (run / "asked").exists(), "the silence was no end"


def test_the_log_of_a_chain_is_followed_from_job_to_job(play: Play, run: Path) -> None:
    """The second job begins after the first has been asked about, and both end before it is asked again."""
    first, second = (run / "logs" / f"log-slurm-{number}.out" for number in (5, 6))
    first.write_text("first\n")
    (run / "launch" / "jobs").write_text("5\n6\n")
    begins = f"echo second >{second}; echo {second} >{run}/launch/log"
    play("squeue", f"[ -e {run}/asked ] && {{ {UNKNOWN}; }}; touch {run}/asked; {begins}; echo RUNNING")
    assert list(follow_log(run, 10, follow=True)) == ["first\n", "second\n"]


def test_a_cluster_that_has_not_enough_nodes_left_is_told_which_are_left_out(play: Play, run: Path) -> None:
    play("squeue", UNKNOWN)
    play("sbatch", "echo 'sbatch: error: Requested node configuration is not available' >&2; exit 1")
    (run / "launch" / "excluded_nodes").write_text("n1\nn2\n")
    job = job_for(recipe("tiny_moe_cpu"), load_cluster("lab"), PurePosixPath(run.parents[1]))
    told = pytest.raises(LaunchError, match=r"cannot give .*not available.*excluded_nodes leaves out n1 n2: ")
    with mock.patch.dict(os.environ), told:
        submit(job, through="sbatch")


def test_a_job_inherits_no_credentials_and_nothing_of_an_outer_allocation(play: Play, run: Path) -> None:
    play("squeue", UNKNOWN)
    play("sbatch", f"env --null >{run}/environment; echo 6")
    job = job_for(recipe("tiny_moe_cpu"), load_cluster("lab"), PurePosixPath(run.parents[1]))
    shell = {
        "BASH_FUNC_module%%": "() {  eval\n}", "AWS_SECRET_ACCESS_KEY": "x", "HF_TOKEN": "x",
        "SLURM_JOB_ID": "3", "SLURM_NNODES": "9", "SBATCH_TIMELIMIT": "5", "SBATCH_WAIT": "1",
        "SSH_AUTH_SOCK": "x", "RANK": "1", "GLOO_SOCKET_IFNAME": "lo", "LOADEDMODULES": "cuda/12",
        "SLURM_CONF": "/etc/slurm/slurm.conf", "LC_ALL": "C", "MODULEPATH": "/modules",
    }  # fmt: skip
    with mock.patch.dict(os.environ, shell):
        assert submit(job, through="sbatch") == ["6"]
    variables = (run / "environment").read_text().split("\0")[:-1]
    given = {name: value for name, _, value in (variable.partition("=") for variable in variables)}
    functions = {name for name in given if name.startswith("BASH_FUNC_")}  # `module` is one
    assert "BASH_FUNC_module%%" in functions
    own = {"PWD", "OLDPWD", "SHLVL", "_", "COLUMNS", "LINES"}  # of the shell that plays sbatch
    allowed = {"HOME", "USER", "LOGNAME", "SHELL", "PATH", "LD_LIBRARY_PATH", "LANG", "TZ"}
    allowed |= {"SLURM_CONF", "LC_ALL", "MODULEPATH"}
    assert set(given) - functions - own <= allowed
    assert given["SLURM_CONF"] == "/etc/slurm/slurm.conf" and given["MODULEPATH"] == "/modules"


def test_what_is_submitted_of_a_chain_is_known_when_slurm_refuses_the_rest(play: Play, run: Path) -> None:
    play("squeue", UNKNOWN)
    count = f"echo x >> {run}/asked; number=$(wc -l < {run}/asked)"
    refuse = "echo 'sbatch: error: QOSMaxSubmitJobPerUserLimit' >&2; exit 1"
    answer = f"[ $number -gt 2 ] && {{ {refuse}; }}\necho $((6 + number))"
    play("sbatch", f"[[ $* == *--test-only* ]] && exit\n{count}\n{answer}")
    job = job_for(recipe("tiny_moe_cpu"), load_cluster("lab"), PurePosixPath(run.parents[1]))
    refused = pytest.raises(
        LaunchError, match=r"2 of 4 jobs are submitted \(7, 8\), and not the next: .*QOSMax"
    )
    with mock.patch.dict(os.environ), refused:  # submit() leaves little of it
        submit(job, chain=4, through="sbatch")
    assert (run / "launch" / "jobs").read_text().split() == ["7", "8"]
    assert (run / "launch" / "log").read_text() == f"{run}/logs/log-slurm-7.out\n"


def test_slurm_is_asked_once_whether_a_job_is_queued(play: Play, run: Path) -> None:
    play("squeue", f"echo x >> {run}/asked; echo COMPLETED")
    assert not is_queued("5") and (run / "asked").read_text() == "x\n"
