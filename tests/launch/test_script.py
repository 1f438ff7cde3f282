"""Batch scripts: of all recipes on both profiles, word for word; what bash says of them; without torch."""

from __future__ import annotations

import functools
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import pytest
import transformers

from megatron_pmd.cli import cluster as commands
from megatron_pmd.cli import train as cli
from megatron_pmd.config import override
from megatron_pmd.errors import ConfigError, LaunchError, LayoutError, ModelError
from megatron_pmd.launch.cluster import load_cluster
from megatron_pmd.launch.history import append
from megatron_pmd.launch.script import TEMPLATE, Job, body, job_for, render
from megatron_pmd.launch.slurm import slurm
from megatron_pmd.outcome import RunOutcome, Status
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


def test_options_with_spaces_reach_sbatch_as_one_word() -> None:
    """tests/slurm has the real sbatch read such a line."""
    cluster = load_cluster("lab").model_copy(
        update={"extra_sbatch": ["--comment=it's two words # and more"], "constraint": "a b"}
    )
    text = render(job_for(recipe("tiny_moe_cpu"), cluster, PurePosixPath("/shared/my 100% folder")))
    words = [word for line in text.splitlines() if line.startswith("#SBATCH") for word in shlex.split(line)]
    assert {"--comment=it's two words # and more", "--constraint=a b"} <= set(words)
    run = "/shared/my 100%% folder/runs/tiny_moe_cpu"
    assert f"--output={run}/logs/log-slurm-%j.out" in words, "sbatch reads %% as %"


HOSTNAMES = 'echo "$*" >>"$CALLS"; [[ "$2" != hostnames ]] || printf "n1\\nn2\\n"'


def run_body(folder: Path, programs: dict[str, str], **variables: str) -> subprocess.CompletedProcess[str]:
    """The body as job 5 on n1 and n2, with these programs, name and text, before the machine's own."""
    played = folder / "bin"
    played.mkdir()
    for name, text in programs.items():
        (played / name).write_text(f"#!/bin/bash\n{text}\n")
        (played / name).chmod(0o755)
    environment = {
        "PMD_RECIPE": "x", "PMD_GPU": "cpu", "PMD_NAME": "run", "PMD_RUNS": str(folder),
        "PMD_ROOT": str(PROJECT), "PMD_HOST_PYTHON": sys.executable, "SLURM_JOB_ID": "5",
        "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2", "SLURM_SUBMIT_DIR": "/",
        "CALLS": str(folder / "calls"), "PATH": f"{played}:{os.environ['PATH']}",
    }  # fmt: skip
    return subprocess.run(
        ["bash"],
        input=body(),
        env=os.environ | environment | variables,
        text=True,
        capture_output=True,
        timeout=60,
    )


def test_the_body_runs_an_attempt_on_all_nodes_and_ends_as_its_outcome_says(tmp_path: Path) -> None:
    seen = 'printf "%s\\n" "$@" >"$CALLS.srun"; env >"$CALLS.env"'
    outcome = """echo '{"status": "saved", "reason": "", "error": null}' >"$PMD_STATE/outcome.json" """
    done = run_body(tmp_path, {"scontrol": HOSTNAMES, "srun": f"{seen}; {outcome}"})
    assert done.returncode == 75, done.stderr
    assert "attempt 1, job 5, nodes n1 n2, rendezvous n1:20005" in done.stderr
    assert (tmp_path / "calls").read_text().splitlines()[-1] == "requeue 5"
    words = (tmp_path / "calls.srun").read_text().splitlines()
    assert words[:4] == ["--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--nodelist=n1,n2"]
    assert words[4:6] == ["--cpu-bind=none", "--kill-on-bad-exit=1"]
    variables = (tmp_path / "calls.env").read_text().splitlines()
    assert {"PMD_NODES=n1 n2", "MASTER_ADDR=n1", "PMD_ATTEMPT=1", "PYTHONUNBUFFERED=1"} <= set(variables)


def test_engine_nodes_have_steps_of_their_own_that_end_with_the_ranks_and_a_requeue_asks_for_all_nodes(
    tmp_path: Path,
) -> None:
    """n2 is one; the step on it that looks after the job, too, is there for the loss of n1."""
    played = """echo "$*" >"$CALLS.srun.$BASHPID"
        case "$*" in *node.main*) sleep 1 ;; *engines*) exec sleep 3 ;; *) exec sleep 50 ;; esac
        echo '{"status": "saved", "reason": "", "error": null}' >"$PMD_STATE/outcome.json" """
    programs = {"scontrol": HOSTNAMES, "squeue": "echo n1,n2", "srun": played}
    variables = {"PMD_RANK_NODES": "1", "PMD_ENGINE_NODES": "1", "PMD_JOB_NODES": "2"}
    done = run_body(tmp_path, programs, **variables)
    assert done.returncode == 75, done.stderr
    steps = {path.read_text() for path in tmp_path.glob("calls.srun.*")}
    [ranks] = [step for step in steps if "megatron_pmd.node.main" in step]
    [engines] = [step for step in steps if "megatron_pmd.cli.main engines" in step]
    [keeper] = steps - {ranks, engines}
    assert ranks.startswith("--nodes=1 --ntasks=1 --ntasks-per-node=1 --nodelist=n1 ")
    assert engines.startswith("--nodes=1 --ntasks=1 --nodelist=n2 ") and engines.endswith(" _ 0\n")
    assert "--nodelist=n2" in keeper and "scontrol requeue" in keeper and keeper.endswith(" _ n1 2\n")
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[-2:] == ["requeue 5", "update JobId=5 NumNodes=2"]
    numbers = [path.suffix.removeprefix(".") for path in tmp_path.glob("calls.srun.*")]
    assert [number for number in numbers if Path(f"/proc/{number}").exists()] == []


def test_a_body_that_has_nothing_to_do_starts_no_step(tmp_path: Path) -> None:
    state = tmp_path / "run" / "launch"
    state.mkdir(parents=True)
    append(state / "history.jsonl", "submitted", job="4")
    append(state / "history.jsonl", "begun", attempt=1, job="4", nodes="n1", checkpoint=None)
    RunOutcome(Status.COMPLETE).write(state / "outcome.json")
    done = run_body(tmp_path, {"srun": 'touch "$CALLS"'}, PMD_CHAIN_LINK="1")
    assert done.returncode == 0, done.stderr
    assert "not started: an earlier job of this chain completed the run" in done.stderr
    assert not (tmp_path / "calls").exists()


def test_apptainer_gets_its_image_its_mounts_and_the_shared_folder(tmp_path: Path) -> None:
    container = {
        "PMD_CONTAINER_RUNTIME": "apptainer", "PMD_CONTAINER_IMAGE": "pmd.sif",
        "PMD_CONTAINER_MOUNTS": "/shared:/shared,/data:/data",
    }  # fmt: skip
    programs = {"scontrol": HOSTNAMES, "srun": 'printf "%s\\n" "$@" >"$CALLS.srun"; exit 3'}
    run_body(tmp_path, programs, PMD_MAX_CRASHES="1", **container)
    words = (tmp_path / "calls.srun").read_text().splitlines()
    start = words.index("apptainer")
    assert words[start : start + 10] == [
        "apptainer", "exec", "--nv", "--no-home", "--pwd", str(PROJECT), "--bind",
        "/shared:/shared,/data:/data", "pmd.sif", "bash",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"PMD_HOST_PYTHON": "python2.9"}, "needs Python 3.9 or newer outside the container"),
        ({"PMD_HOST_PYTHON": "old_python"}, "(PMD_HOST_PYTHON=old_python)"),
        ({"PMD_ROOT": "/only/in/the/container"}, "from PMD_ROOT=/only/in/the/container"),
        ({"PMD_CONTAINER_RUNTIME": "docker"}, "docker is not pyxis, apptainer or none"),
    ],
)
def test_a_host_that_cannot_run_the_script_is_told_what_it_needs(
    tmp_path: Path, variables: dict[str, str], words: str
) -> None:
    done = run_body(tmp_path, {"old_python": "exit 1", "srun": 'touch "$CALLS"'}, **variables)
    assert done.returncode == 2
    assert words in done.stdout
    assert not (tmp_path / "calls").exists()


def test_ranks_that_do_not_fill_nodes_are_refused() -> None:
    config = override(recipe("qwen2_5_7b_dapo_8xh100"), ["layout.data=6"])
    with pytest.raises(LayoutError, match="12 ranks do not fill nodes of 8"):
        job_for(config, load_cluster("h100"), PurePosixPath("/shared/pmd"))


SEPARATE = ["rollout.placement=separate", "rollout.ranks_per_engine=2", "rollout.tensor_parallel=2"]


def test_a_node_gives_gpus_to_its_ranks_and_to_their_separate_engines() -> None:
    config = override(recipe("qwen3_30b_a3b_dapo_32xh100"), SEPARATE)
    placed = job_for(config, load_cluster("h100"), PurePosixPath("/shared/pmd"))
    assert (placed.ranks_per_node, placed.gpus_per_node, placed.nodes) == (4, 8, 8)
    script = render(placed)
    assert "#SBATCH --gpus-per-node=8" in script and "export PMD_RANKS_PER_NODE=4" in script


def test_separate_engines_that_no_node_has_room_for_are_refused() -> None:
    config = override(
        recipe("qwen3_30b_a3b_dapo_32xh100"),
        [*SEPARATE, "rollout.ranks_per_engine=8", "rollout.tensor_parallel=4"],
    )
    with pytest.raises(LayoutError, match=r"ranks_per_engine=8 ranks and an engine .* do not fit"):
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


def test_nodes_that_the_profile_excludes_are_left_out_beside_them_and_at_every_requeue() -> None:
    cluster = load_cluster("lab").model_copy(update={"extra_sbatch": ["--exclude=n[8-9]", "--mem=200G"]})
    text = render(Job(recipe("tiny_moe_cpu"), cluster, PurePosixPath("/s"), excluded_nodes=("n1",)))
    assert "#SBATCH --exclude='n[8-9],n1'\n" in text and "#SBATCH --mem=200G\n" in text
    assert "export PMD_EXCLUDED_NODES='n[8-9]'\n" in text


def test_local_trains_here_and_refuses_what_only_a_cluster_has(monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[tuple[object, ...]] = []
    monkeypatch.setattr(cli, "train", lambda *words, replay: trained.append((*words, replay)))
    launch = functools.partial(commands.launch, "tiny_moe_cpu", ["iterations=3"], through="auto", local=True)
    for dry_run, chain, cluster in ((True, 1, None), (False, 2, None), (False, 1, "h100")):
        with pytest.raises(LaunchError, match="--dry-run, --chain and --through are for a cluster"):
            launch(dry_run=dry_run, chain=chain, cluster=cluster)
    assert trained == []
    launch(dry_run=False, chain=1)
    assert trained == [("tiny_moe_cpu", ["iterations=3"], None)]


def dry_run_of(kind: type[transformers.PretrainedConfig], model: Path, *more: str) -> Callable[..., None]:
    """A launch for eight H100 of a tiny model of this kind, which is printed and not submitted."""
    kind(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=64
    ).save_pretrained(model)
    settings = [f"model.path={model}", "model.prepare=null", "layout.expert=1", "layout.data=8"]
    settings += ["warm_start=null", "rollout.ranks_per_engine=1", *more]
    return functools.partial(
        commands.launch, "tiny_moe_cpu", settings, cluster="h100", dry_run=True, chain=1, through="auto"
    )


def test_a_model_that_no_engine_serves_is_refused_before_it_queues_where_engines_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    launch = dry_run_of(transformers.NemotronConfig, tmp_path / "model")
    with pytest.raises(ModelError, match="no engine starts for models of type nemotron"):
        launch()
    launch(replay=tmp_path)
    assert "#SBATCH" in capsys.readouterr().out
    supervised = ["algorithm.objective=sft", "batch.samples_per_prompt=1", "rollout.function=null"]
    supervised += ["actor.experts.replay_routing=false", "rollout.partial=null"]
    dry_run_of(transformers.NemotronConfig, tmp_path / "model", *supervised)()
    assert "#SBATCH" in capsys.readouterr().out


def test_a_replay_is_launched_where_its_recipes_engines_would_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    launch = functools.partial(
        commands.launch, "qwen3_30b_a3b_dapo_32xh100", ["rollout.sglang={}"], dry_run=True, chain=1
    )
    with pytest.raises(LayoutError, match="set mem_fraction_static"):
        launch(through="auto")
    launch(through="auto", replay=tmp_path)
    assert "engines                      none" in capsys.readouterr().out


def test_a_family_that_the_planner_cannot_count_is_launched_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dry_run_of(transformers.OlmoeConfig, tmp_path / "model")()
    said = capsys.readouterr()
    assert "#SBATCH" in said.out
    assert "memory and disk not compared with a plan" in said.err and "a model of type olmoe" in said.err


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


@pytest.mark.parametrize("command", [commands.cancel, commands.status])
def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, command: Callable[[Path], None]) -> None:
    with pytest.raises(LaunchError, match="nothing was launched here; give the folder of one run"):
        command(tmp_path)


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name in RECIPES:
        for profile in ("h100", "lab"):
            (GOLDEN / f"{name}.{profile}.sbatch").write_text(head(name, profile))
