"""Batch scripts: of all recipes on both profiles, word for word; what bash says of them; without torch."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path, PurePosixPath

import pytest

from megatron_pmd.cli import cluster as commands
from megatron_pmd.cli import train as cli
from megatron_pmd.config import override
from megatron_pmd.errors import ConfigError, LaunchError, LayoutError
from megatron_pmd.launch.cluster import load_cluster
from megatron_pmd.launch.script import TEMPLATE, Job, body, job_for, render
from megatron_pmd.launch.submit import slurm
from recipes import RECIPES, recipe

GOLDEN = Path(__file__).parent / "golden"
PROJECT = Path(__file__).parents[2]


def job(name: str, profile: str) -> Job:
    return job_for(recipe(name), load_cluster(profile), PurePosixPath("/shared/pmd"))


def head(name: str, profile: str) -> str:
    """The script up to the body, which is the same file for all."""
    script = render(job(name, profile))
    assert script.endswith(body())
    return script.removesuffix(body())


@pytest.mark.parametrize("profile", ["h100", "lab"])
@pytest.mark.parametrize("name", RECIPES)
def test_the_scripts_are_those_that_were_reviewed(name: str, profile: str) -> None:
    """After a change on purpose: python -m tests.launch.test_script, and read the difference."""
    assert head(name, profile) == (GOLDEN / f"{name}.{profile}.sbatch").read_text()


def test_bash_accepts_the_script() -> None:
    for text in (TEMPLATE.read_text(), render(job("tiny_moe_cpu", "lab"))):
        assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).stderr == ""


def test_values_with_spaces_and_quotes_reach_the_environment_unharmed() -> None:
    cluster = load_cluster("lab").model_copy(update={"setup": ["module load 'cuda 12'", 'echo "$HOME"']})
    text = render(job_for(recipe("tiny_moe_cpu"), cluster, PurePosixPath("/shared/p")))
    exports = [line for line in text.splitlines() if line.startswith("export PMD_SETUP=")]
    command = ["bash", "-c", f'{exports[0]}; printf %s "$PMD_SETUP"']
    done = subprocess.run(command, text=True, capture_output=True, check=True)
    assert done.stdout == "module load 'cuda 12' && echo \"$HOME\""


def test_a_job_of_a_chain_whose_first_start_slurm_lost_still_ends_with_the_run(tmp_path: Path) -> None:
    """Slurm calls its second start a restart, but the script has not been there before."""
    state = tmp_path / "done" / "launch"
    state.mkdir(parents=True)
    (state / "outcome").write_text("complete\n")
    (state / "history").write_text("submitted 4\nbegin 2 at iteration-4\n")
    variables = {
        "PMD_RECIPE": "x", "PMD_GPU": "cpu", "PMD_NAME": "done", "PMD_RUNS": str(tmp_path),
        "PMD_CHAIN_LINK": "2", "SLURM_JOB_ID": "5", "SLURM_RESTART_COUNT": "1",
        "SLURM_SUBMIT_DIR": str(tmp_path),
    }  # fmt: skip
    done = subprocess.run(["bash"], input=body(), env=os.environ | variables, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "megatron-pmd: not started: an earlier job of this chain completed the run\n"


def play(folder: Path, programs: dict[str, str]) -> str:
    """A PATH on which these programs, name and body, stand before the machine's own."""
    folder.mkdir()
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_a_first_node_that_was_lost_is_excluded_although_the_script_went_with_it(tmp_path: Path) -> None:
    """Slurm's commands are played: the job starts again on other nodes, fails there, and is requeued."""
    state, calls = tmp_path / "run" / "launch", tmp_path / "calls"
    state.mkdir(parents=True)
    (state / "history").write_text("submitted 5\nbegin 1 at nothing\n")
    (state / "nodes").write_text("n[1-2]\n")
    played = {
        "sinfo": '[[ "$*" == *"n[1-2]" ]] && echo "n1 down*" && echo "n2 idle" || echo "n3 idle"',
        "scontrol": 'echo "$*" >>"$CALLS"; [[ "$2" == hostnames ]] && printf "n2\\nn3\\n" || true',
        "srun": "exit 3",
        "sleep": "true",
    }
    variables = {
        "PMD_RECIPE": "x", "PMD_GPU": "cpu", "PMD_NAME": "run", "PMD_RUNS": str(tmp_path),
        "SLURM_JOB_ID": "5", "SLURM_RESTART_COUNT": "1", "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_NODELIST": "n[2-3]", "SLURM_NNODES": "2", "CALLS": str(calls),
        "PATH": play(tmp_path / "bin", played),
    }  # fmt: skip
    done = subprocess.run(["bash"], input=body(), env=os.environ | variables, text=True, capture_output=True)
    assert done.returncode == 1, done.stderr
    assert (
        "megatron-pmd: node n1 is excluded from now on\nmegatron-pmd: attempt 1, job 5, nodes n2 n3"
        in done.stdout
    )
    assert (state / "excluded_nodes").read_text() == "n1\n"
    assert calls.read_text().splitlines()[-2:] == ["requeue 5", "update JobId=5 ExcNodeList=n1"]


def test_apptainer_gets_its_image_its_mounts_and_the_shared_folder(tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    played = {"scontrol": "echo n1", "srun": 'printf "%s\\n" "$@" >"$CALLS"; exit 3'}
    variables = {
        "PMD_RECIPE": "x", "PMD_GPU": "cpu", "PMD_NAME": "run", "PMD_RUNS": str(tmp_path),
        "PMD_ROOT": "/shared", "PMD_MAX_CRASHES": "1", "PMD_CONTAINER_RUNTIME": "apptainer",
        "PMD_CONTAINER_IMAGE": "pmd.sif",
        "PMD_CONTAINER_MOUNTS": "/shared:/shared,/data:/data", "SLURM_JOB_ID": "5", "SLURM_SUBMIT_DIR": "/",
        "SLURM_JOB_NODELIST": "n1", "SLURM_NNODES": "1", "CALLS": str(calls),
        "PATH": play(tmp_path / "bin", played),
    }  # fmt: skip
    subprocess.run(["bash"], input=body(), env=os.environ | variables, text=True, capture_output=True)
    words = calls.read_text().splitlines()
    start = words.index("apptainer")
    assert words[start : start + 10] == [
        "apptainer", "exec", "--nv", "--no-home", "--pwd", "/shared", "--bind", "/shared:/shared,/data:/data",
        "pmd.sif", "bash",
    ]  # fmt: skip


def test_ranks_that_do_not_fill_nodes_are_refused() -> None:
    config = override(recipe("qwen2_5_7b_dapo_8xh100"), ["layout.data=6"])
    with pytest.raises(LayoutError, match="12 ranks do not fill nodes of 8"):
        job_for(config, load_cluster("h100"), PurePosixPath("/shared/pmd"))


def test_engines_of_which_nodes_would_have_unequal_parts_are_refused() -> None:
    config = override(recipe("qwen2_5_7b_dapo_8xh100"), ["layout.data=12", "rollout.tensor_parallel=12"])
    with pytest.raises(LayoutError, match=r"engine 0 .*8 \+ 4 ranks on nodes 0, 1"):
        job_for(config, load_cluster("h100"), PurePosixPath("/shared/pmd"))


def test_a_shared_folder_outside_the_container_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"/home/me is under none of container\.mounts' targets"):
        job_for(recipe("qwen2_5_7b_dapo_8xh100"), load_cluster("h100"), PurePosixPath("/home/me"))


def test_nodes_that_failed_before_are_left_out() -> None:
    excluding = Job(
        recipe("tiny_moe_cpu"), load_cluster("lab"), PurePosixPath("/s"), excluded_nodes=("n1", "n7")
    )
    assert "#SBATCH --exclude=n1,n7\n" in render(excluding)


def test_local_trains_here_and_refuses_what_only_a_cluster_has(monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[tuple[object, ...]] = []
    monkeypatch.setattr(cli, "train", lambda *words, replay: trained.append((*words, replay)))
    launch = functools.partial(
        commands.launch, "tiny_moe_cpu", ["iterations=3"], cluster="h100", through="auto", local=True
    )
    for dry_run, chain in ((True, 1), (False, 2)):
        with pytest.raises(LaunchError, match="--dry-run and --chain are for a cluster"):
            launch(dry_run=dry_run, chain=chain)
    assert trained == []
    launch(dry_run=False, chain=1)
    assert trained == [("tiny_moe_cpu", ["iterations=3"], None)]


def test_a_dry_run_needs_neither_slurm_nor_torch(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "for name in ('torch', 'numpy', 'psutil', 'transformers', 'megatron', 'sglang'):\n"
        "    sys.modules[name] = None\n"
        "sys.argv = ['megatron-pmd', 'launch', 'kimi_k2_1t_512xh100', '--dry-run', 'algorithm.tau=0.05']\n"
        "from megatron_pmd.cli.main import main\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | {"PATH": "/nonexistent", "PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert '"tau": 0.05' in done.stdout
    assert "optimizer steps per rollout  16 of 512 samples" in done.stdout
    assert "#SBATCH --nodes=64" in done.stdout


def test_without_slurm_the_error_says_where_to_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(LaunchError, match="sbatch is not here: run this on a login node"):
        slurm("sbatch", "x")


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name in RECIPES:
        for profile in ("h100", "lab"):
            (GOLDEN / f"{name}.{profile}.sbatch").write_text(head(name, profile))
