"""Runs on a real Slurm of this machine: to the end, interrupted, cancelled, crashed, impossible."""

from __future__ import annotations

import shlex
import signal
import sys
from pathlib import Path

import pytest

from megatron_pmd.node.worker import PROCESS_TITLE
from megatron_pmd.outcome import RunOutcome, Status
from tests.slurm.cluster import LIVE, PROJECT, Cluster, processes_on_nodes, slurm, started_by_slurm

pytestmark = pytest.mark.slow


def test_a_run_on_two_nodes_trains_to_its_end(cluster: Cluster, live: str) -> None:
    steps = cluster.steps("live")
    assert len(steps) == 16 and all(step["gradient_norm"] > 0 for step in steps)
    assert cluster.outcome("live") == RunOutcome(Status.COMPLETE)
    assert cluster.job(live)["ExitCode"] == "0:0"
    assert "Comment=two words, # one value" in slurm("scontrol", "show", "job", live)
    iteration = ["rollout", "release", "anchor", "update", "sync", "resume"]
    assert [phase for t, phase in cluster.phases("live") if t == 1] == iteration
    reports = cluster.run("live") / "launch" / "preflight" / "1"
    assert sorted(path.name for path in reports.glob("*.json")) == ["0.json", "1.json"]
    assert (cluster.run("live") / "logs" / "attempt-1").is_dir()
    assert (cluster.run("live") / "logs" / "engine-0-node-1.log").is_file()
    status = cluster.command("status", str(cluster.run("live")))
    assert "4 of 4 iterations" in status and f"job {live}: COMPLETED" in status


def test_a_finished_run_submitted_again_says_so_and_a_chain_ends_with_it(cluster: Cluster, live: str) -> None:
    before = cluster.text("live", "ledger.jsonl")
    first = cluster.launch("live", cluster.profile(), *LIVE, "--chain", "2")
    numbers = cluster.text("live", "launch/jobs").split()
    assert numbers[0] == first and len(numbers) == 2
    for number in numbers:
        assert cluster.wait_for_end(number, "live") == "COMPLETED"
    log = cluster.log("live")
    assert "is complete: nothing is left to train" in log
    assert "not started: an earlier job of this chain completed the run" in log
    assert cluster.text("live", "ledger.jsonl") == before


def test_the_script_alone_trains_the_same_from_environment_variables(cluster: Cluster, live: str) -> None:
    variables = {
        "PMD_RECIPE": str(cluster.run("live") / "launch" / "config.json"),
        "PMD_NAME": "alone",
        "PMD_SETTINGS": "name=alone",
        "PMD_REPLAY": str(cluster.run("live") / "rollouts"),
        "PMD_RUNS": str(cluster.shared / "runs"),
        "PMD_ROOT": str(cluster.shared),
        "PMD_PYTHON": sys.executable,
        "PMD_GPU": "cpu",
        "PMD_RANKS_PER_NODE": "1",
        "PYTHONPATH": str(PROJECT),
    }
    words = ("--parsable", "--nodes=2", f"--output={cluster.shared}/alone-%j.out")
    script = str(PROJECT / "slurm" / "train.sbatch")
    number = slurm("sbatch", *words, script, environment=variables)
    assert cluster.wait_for_end(number, "alone") == "COMPLETED", cluster.log("alone")
    assert cluster.steps("alone") == cluster.steps("live")
    assert f"job {number}: COMPLETED" in cluster.command("status", str(cluster.run("alone")))
    number = slurm("sbatch", *words, script, environment=variables)
    assert cluster.wait_for_end(number, "alone") == "COMPLETED", cluster.log("alone")
    again = (cluster.shared / f"alone-{number}.out").read_text()
    assert "nodes n1 n2" in again and "is complete: nothing is left to train" in again


def test_told_to_save_a_run_is_requeued_and_resumes_to_the_same_metrics(
    cluster: Cluster, live: str, nemo_python: Path
) -> None:
    """Submitted through nemo-run. No checkpoint is due before the end: it resumes from the signal's."""
    words = ("--replay", str(cluster.run("live") / "rollouts"))
    number = cluster.launch("told", cluster.profile(), *words, through="nemo-run", python=nemo_python)
    cluster.wait(lambda: (0, "anchor") in cluster.phases("told"), "anchor of iteration 0", "told")
    slurm("scancel", "--signal=USR1", number)
    assert cluster.wait_for_end(number, "told") == "COMPLETED", cluster.log("told")
    log = cluster.log("told")
    assert "was told to save (SIGUSR1)" in log and "attempt 1 ended: saved" in log
    assert any(f"resuming after {done} iterations" in log for done in (1, 2, 3))
    assert [event["attempt"] for event in cluster.begun("told")] == [1, 2]
    assert cluster.steps("told") == cluster.steps("live")
    values = [
        line["iteration"] for line in cluster.lines("told", "metrics.jsonl") if line["kind"] == "iteration"
    ]
    assert values == [0, 1, 2, 3]
    assert "attempt 2 ended: complete" in cluster.command(
        "logs", "-f", str(cluster.run("told")), python=nemo_python
    )


def test_told_to_save_through_slurms_own_children_alone_a_run_with_a_live_engine_does(
    cluster: Cluster,
) -> None:
    """So does Slurm with proctrack/cgroup; the lab's proctrack/linuxproc would signal every process."""
    cluster.launch("child", cluster.profile(), *LIVE)
    cluster.wait(lambda: (0, "anchor") in cluster.phases("child"), "anchor of iteration 0", "child")
    children = started_by_slurm("megatron_pmd.node.main")
    assert len(children) == 2, "one a node"
    for child in children:
        child.send_signal(signal.SIGUSR1)
    cluster.wait(lambda: "attempt 1 ended" in cluster.log("child"), "the first attempt's end", "child")
    cluster.command("cancel", str(cluster.run("child")))
    log = cluster.log("child")
    assert "attempt 1 ended: saved: was told to save (SIGUSR1)" in log
    assert "died and were started again" not in log
    assert list(cluster.run("child").glob("checkpoints/iteration-*/run_state.json"))


def test_cancelling_leaves_no_process_on_any_node(cluster: Cluster, live: str) -> None:
    number = cluster.launch("cancelled", cluster.profile())
    cluster.wait(
        lambda: any("sglang" in line for line in processes_on_nodes()), "an engine on a node", "cancelled"
    )
    assert any(PROCESS_TITLE in line for line in processes_on_nodes())
    assert f"cancelled {number}" in cluster.command("cancel", str(cluster.run("cancelled")))
    cluster.wait(lambda: processes_on_nodes() == [], "no process is left", "cancelled")
    assert cluster.wait_for_end(number, "cancelled") == "CANCELLED"
    status = cluster.command("status", str(cluster.run("cancelled")))
    assert "attempt 1 ended: interrupted" in status and "failed" not in status


def test_nodes_lost_in_an_update_and_in_a_save_are_replaced_and_the_run_goes_on_in_containers(
    cluster: Cluster, live: str
) -> None:
    """Twice the second node loses power, and another takes its place; the metrics are those of `live`."""
    only_inside = cluster.folder / "only_inside"
    only_inside.mkdir()
    container = (
        '[container]\nruntime = "pyxis"\nimage = "image.sqsh"\n'
        f'mounts = ["{cluster.shared}:{cluster.shared}", "{only_inside}:/mnt/only_inside"]\n'
    )
    setup = 'test -d /mnt/only_inside -a "$PYXIS_STANDIN_IMAGE" = image.sqsh'
    profile = cluster.profile("container", setup, container)
    words = ("--replay", str(cluster.run("live") / "rollouts"), "checkpoint.every=1")
    number = cluster.launch("lost", profile, *words)
    checkpoints = cluster.run("lost") / "checkpoints"

    def saved() -> int:
        """Iterations of the newest checkpoint: written beside training, it may not be there yet."""
        return max((int(p.name[-1]) for p in checkpoints.glob("iteration-?")), default=0)

    def updates() -> bool:
        return bool(saved()) and cluster.phases("lost")[-1][1] == "anchor"

    def saves() -> bool:
        return saved() > resumed and any(checkpoints.glob("*.partial"))

    for begun, what in ((updates, "an update"), (saves, "a save")):
        resumed = saved()
        cluster.wait(begun, what, "lost")
        lost = nodes_of(cluster, number)[1]
        cluster.lab("crash", lost)
        try:
            cluster.wait(lambda: lost not in nodes_of(cluster, number), f"another node than {lost}", "lost")  # noqa: B023
        finally:
            cluster.lab("start", lost)
    assert cluster.wait_for_end(number, "lost") == "COMPLETED", cluster.log("lost")
    # a node that is back while Slurm starts the job on it may cost one attempt more
    assert len(cluster.begun("lost")) in (3, 4)
    assert cluster.steps("lost") == cluster.steps("live")


def nodes_of(cluster: Cluster, number: str) -> list[str]:
    """Of a job; none while it is requeued."""
    return slurm("scontrol", "show", "hostnames", cluster.job(number)["NodeList"]).split()


def _join_as_engine_node_1(cluster: Cluster, name: str) -> str:
    """The number of a job on n3, as a user would submit one."""
    run = cluster.run(name)
    command = [sys.executable, "-m", "megatron_pmd.cli.main", "engines", str(run), "--node", "1"]
    return slurm(
        "sbatch", "--parsable", "--nodelist=n3", f"--output={run}/logs/joining.out",
        f"--wrap={shlex.join(command)}", environment={"PYTHONPATH": str(PROJECT)},
    )  # fmt: skip


def test_a_run_with_engine_nodes_goes_on_without_one_takes_another_and_comes_back_when_its_first_node_is_lost(
    cluster: Cluster,
) -> None:
    """Ranks on n1; an engine on each of n2 and n3, which take weights over the nodes' network."""
    words = (
        "layout.data=2", "layout.expert=1", "rollout.ranks_per_engine=1", "layout.engine_nodes=2",
        "rollout.placement=separate", "rollout.staleness=1", "sync.transport=broadcast", "checkpoint.every=1",
        "rollout.start_timeout_seconds=120",
        # three seconds each, so that some are left when the first node is lost and replaced
        "iterations=60", "reward.name=tests.end_to_end.rewards:letters_slowly", "reward.workers=1",
    )  # fmt: skip
    two_ranks = "gpus_per_node = 2"
    profile = Path(cluster.profile("engines"))
    profile.write_text(profile.read_text().replace("gpus_per_node = 1", two_ranks))
    number = cluster.launch("engines", str(profile), *words)

    def trained(iteration: int) -> bool:
        return (iteration, "update") in cluster.phases("engines")

    cluster.wait(lambda: trained(1), "two iterations", "engines")
    cluster.lab("crash", "n3")
    try:
        lost = "left out until they answer: engine 1"
        cluster.wait(lambda: lost in " ".join(cluster.log("engines").split()), "n3's loss", "engines")
        cluster.wait(lambda: nodes_of(cluster, number) == ["n1", "n2"], "Slurm to take n3 away", "engines")
        last = cluster.phases("engines")[-1][0]
        cluster.wait(lambda: trained(last + 1), "an iteration without n3", "engines")
        assert len(cluster.begun("engines")) == 1
    finally:
        cluster.lab("start", "n3")
    # a node that joins: the same machine, in a job of its own, as a user would add another one
    joining = _join_as_engine_node_1(cluster, "engines")
    try:
        back = "taken back, with the current weights: engine 1"
        cluster.wait(lambda: back in " ".join(cluster.log("engines").split()), "n3 to join", "engines")
        last = cluster.phases("engines")[-1][0]
        cluster.wait(lambda: trained(last + 1), "an iteration with n3", "engines")
        assert len(cluster.begun("engines")) == 1
    finally:
        slurm("scancel", joining)
    cluster.lab("crash", "n1")
    try:
        cluster.wait(
            lambda: cluster.job(number)["JobState"] == "PENDING", "its requeue", "engines", hasten=False
        )
    finally:
        cluster.lab("start", "n1")
    cluster.wait(lambda: len(cluster.begun("engines")) == 2, "the second start", "engines", hasten=False)
    saved = int(cluster.begun("engines")[1]["checkpoint"].removeprefix("iteration-"))
    # more than the first start can have begun behind its newest checkpoint
    cluster.wait(lambda: trained(saved + 2), "iterations of the second start", "engines")
    assert [event["nodes"] for event in cluster.begun("engines")] == ["n[1-3]", "n[1-3]"]
    slurm("scancel", number)
    assert cluster.wait_for_end(number, "engines") == "CANCELLED"


def test_a_node_that_fails_the_preflight_is_named_and_left_out(cluster: Cluster, live: str) -> None:
    setup = '{ [ "$SLURMD_NODENAME" != n2 ] || export PMD_INTERFACES=ib7; }'
    number = cluster.launch("unfit", cluster.profile("unfit", setup), "--replay", str(cluster.run("live")))
    cluster.wait(lambda: "attempt 2, job" in cluster.log("unfit"), "a second attempt", "unfit")
    cluster.command("cancel", str(cluster.run("unfit")))
    log = cluster.log("unfit")
    assert "node n2: none of the network interfaces ib7 has an IPv4 address; there are" in log
    assert cluster.text("unfit", "launch/excluded_nodes") == "n2\n"
    assert f"attempt 2, job {number}, nodes n1 n3" in log


def test_a_crash_loop_stops_with_its_reason_and_no_job_of_the_chain_starts_again(cluster: Cluster) -> None:
    number = cluster.launch("loop", cluster.profile("loop", "exit 3"), "--chain", "2")
    last = cluster.text("loop", "launch/jobs").split()[-1]
    assert cluster.wait_for_end(number, "loop") == "FAILED"
    assert cluster.wait_for_end(last, "loop") == "FAILED"
    assert len(cluster.begun("loop")) == 2
    reason = "crashed 2 times without a new checkpoint; the last reason: the job step ended with exit code 3"
    assert f"not started: an earlier job of this chain stopped: {reason}" in cluster.log("loop")
    assert f"stopped: {reason}" in cluster.command("status", str(cluster.run("loop")))


def test_what_only_a_person_can_mend_is_not_tried_again(cluster: Cluster) -> None:
    number = cluster.launch("wrong", cluster.profile(), 'rollout.sglang={"nonsense": 1}')
    assert cluster.wait_for_end(number, "wrong") == "FAILED"
    assert cluster.job(number)["ExitCode"] == "2:0"
    outcome = cluster.outcome("wrong")
    assert outcome is not None and outcome.status is Status.REFUSED and outcome.error == "ConfigError"
    assert "rollout.sglang.nonsense is not an option" in outcome.reason
    assert "stopped: refused: ConfigError" in cluster.command("status", str(cluster.run("wrong")))
    assert len(cluster.begun("wrong")) == 1


def test_an_allocation_that_the_cluster_cannot_give_is_refused_at_once(cluster: Cluster) -> None:
    words = ("launch", "tiny_moe_cpu", "--cluster", cluster.profile(), "--through", "sbatch", "name=large")
    output = cluster.command(*words, "layout.data=8", "rollout.ranks_per_engine=8", expect=1)
    assert "Requested node configuration is not available" in output
    assert "8 nodes" in output
    assert slurm("squeue", "-h") == ""
