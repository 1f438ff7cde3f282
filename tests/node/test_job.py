"""What becomes of a Slurm job: every row of the table in docs/slurm.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_pmd.launch.history import History
from megatron_pmd.node.job import main
from megatron_pmd.node.restarts import Action, Limits, after_end, before_start, judge
from megatron_pmd.outcome import EXIT_CODES, RunOutcome, Status
from tests.node.played_slurm import Played, Start

PROJECT = Path(__file__).parents[2]
FAILED = RunOutcome(Status.FAILED, "n2: engine 1 died", "EngineError")
SAVED = RunOutcome(Status.SAVED, "told to save (SIGUSR1)")


def test_a_run_that_has_trained_all_iterations_ends_with_0(played: Played, start: Start) -> None:
    start.begin()
    played.written(RunOutcome(Status.COMPLETE))
    assert start.end(0) == 0
    assert "attempt 1 ended: complete" in start.log
    assert played.calls("requeue") == []


def test_a_run_that_saved_is_requeued_and_goes_on_from_its_checkpoint(played: Played, start: Start) -> None:
    assert start.begin()["PMD_ATTEMPT"] == "1"
    played.checkpoint("iteration-3")
    played.written(SAVED)
    assert start.end(0) == 75  # as `megatron-pmd train` exits
    assert played.calls("requeue") == ["requeue 5"]
    again = start.begin(restarts=1)
    assert again["PMD_ATTEMPT"] == "2"
    assert "from iteration-3" in start.log
    assert played.outcomes() == ["saved", None]


def test_a_run_that_saves_without_end_is_started_so_often_as_it_may(played: Played, start: Start) -> None:
    """Saving is no crash, also where the checkpoint was there already: only PMD_MAX_ATTEMPTS bounds it."""
    start.monkeypatch.setenv("PMD_MAX_ATTEMPTS", "4")
    start.monkeypatch.setenv("PMD_MAX_CRASHES", "2")
    for restarts in range(4):
        assert start.begin(restarts=restarts)["PMD_ATTEMPT"] == str(restarts + 1)
        played.written(SAVED)
        code = start.end(0)
    assert code == 1
    assert played.calls("requeue") == ["requeue 5"] * 3
    assert (
        played.history().stopped == "started 4 times since it was submitted, not complete: PMD_MAX_ATTEMPTS=4"
    )


def test_a_failure_is_requeued_without_the_nodes_that_slurm_has_given_up_or_the_preflight_named(
    played: Played, start: Start
) -> None:
    start.begin()
    (played.state / "bad_nodes").write_text("n2\n")
    played.node_states(n1="down*", n2="allocated")
    played.written(FAILED)
    assert start.end(1) == 1
    assert played.calls("requeue") + played.calls("update") == [
        "requeue 5",
        "update JobId=5 ExcNodeList=n1,n2",
    ]
    assert (played.state / "excluded_nodes").read_text() == "n1\nn2\n"
    assert "node n1 is excluded from now on" in start.log
    assert "attempt 1 ended: failed: EngineError: n2: engine 1 died" in start.log


@pytest.mark.parametrize("word", ["down", "down*", "drained", "draining", "drained*", "fail", "failing"])
def test_nodes_in_these_states_of_slurm_get_no_more_attempts(played: Played, start: Start, word: str) -> None:
    """The states are those that sinfo's manual lists for nodes that get no new jobs."""
    start.begin()
    played.node_states(n1="allocated", n2=word)
    played.written(FAILED)
    start.end(1)
    assert (played.state / "excluded_nodes").read_text() == "n2\n"


@pytest.mark.parametrize("word", ["idle", "mixed", "allocated", "completing", "planned", "reserved"])
def test_nodes_in_these_states_are_used_again(played: Played, start: Start, word: str) -> None:
    start.begin()
    played.node_states(n1=word, n2=word)
    played.written(FAILED)
    start.end(1)
    assert not (played.state / "excluded_nodes").exists()
    assert played.calls("update") == []


def test_a_node_whose_line_a_person_deleted_is_used_again(played: Played, start: Start) -> None:
    (played.state).mkdir(parents=True)
    (played.state / "excluded_nodes").write_text("n7\n")
    start.begin()
    (played.state / "excluded_nodes").write_text("")
    played.written(FAILED)
    start.end(1)
    assert played.calls("update") == []


def test_a_first_node_that_is_lost_with_the_batch_script_counts_as_a_failure_and_is_left_out(
    played: Played, start: Start
) -> None:
    start.begin()
    played.node_states(n1="down*", n2="idle")
    assert start.begin(restarts=1)["PMD_ATTEMPT"] == "2"
    assert "node n1 is excluded from now on" in start.log
    assert "attempt 1 ended: failed: lost: n1" in start.log
    assert (played.state / "excluded_nodes").read_text() == "n1\n"
    assert played.outcomes() == ["failed", None]


def test_what_the_other_nodes_wrote_before_the_first_was_lost_is_its_outcome(
    played: Played, start: Start
) -> None:
    """The run saved, and the node went before the script could say so: this is no crash."""
    start.begin()
    played.written(SAVED)
    start.begin(restarts=1)
    assert played.outcomes() == ["saved", None]
    assert RunOutcome.read(played.state / "outcome.json") is None, "it would be taken for the next attempt's"


@pytest.mark.parametrize("crashes", [1, 3])
def test_failures_in_a_row_without_a_new_checkpoint_stop_the_run_with_the_last_reason(
    played: Played, start: Start, crashes: int
) -> None:
    start.monkeypatch.setenv("PMD_MAX_CRASHES", str(crashes))
    played.checkpoint("iteration-10")
    played.checkpoint("iteration-9")
    for attempt in range(crashes):
        start.begin(restarts=attempt)
        played.written(RunOutcome(Status.FAILED, f"n1: reason {attempt + 1}", "StaleWeights"))
        code = start.end(1)
    assert code == 1
    assert len(played.calls("requeue")) == crashes - 1
    stopped = f"crashed {crashes} times without a new checkpoint; the last reason: n1: reason {crashes}"
    assert played.history().stopped == stopped
    assert f"stopped: {stopped}" in played.described()


def test_a_new_checkpoint_makes_failures_count_from_nothing_again(played: Played, start: Start) -> None:
    start.monkeypatch.setenv("PMD_MAX_CRASHES", "2")
    for attempt in range(5):
        start.begin(restarts=attempt)
        played.checkpoint(f"iteration-{attempt}")
        played.checkpoint(f"iteration-{attempt + 1}.partial")
        played.written(FAILED)
        assert start.end(1) == 1
    assert len(played.calls("requeue")) == 5


def test_a_first_node_lost_again_and_again_stops_the_run_at_the_next_start(
    played: Played, start: Start
) -> None:
    """end() is never called: the failures are counted from what begin() wrote."""
    start.monkeypatch.setenv("PMD_MAX_CRASHES", "2")
    start.begin()
    start.begin(restarts=1)
    assert start.begin(restarts=2) == {"exit": "1"}
    assert "crashed 2 times without a new checkpoint" in str(played.history().stopped)


@pytest.mark.parametrize("error", ["ConfigError", "LayoutError", "DataError", "ModelError"])
def test_what_a_person_has_to_mend_stops_the_run_at_once(played: Played, start: Start, error: str) -> None:
    start.begin()
    played.written(RunOutcome(Status.REFUSED, "n1: no such file", error))
    assert start.end(1) == 2
    assert played.calls("requeue") == []
    assert played.history().stopped == f"refused: {error}: n1: no such file"


def test_an_alarm_that_stops_the_run_stops_it_at_once(played: Played, start: Start) -> None:
    start.begin()
    played.written(RunOutcome(Status.ALARMED, "entropy_collapse: 0.01 < 0.05"))
    assert start.end(0) == 3
    assert played.calls("requeue") == []
    assert played.history().stopped == "alarmed: entropy_collapse: 0.01 < 0.05"


def test_a_cancelled_job_is_not_started_again_and_not_called_failed(played: Played, start: Start) -> None:
    """Slurm kills the batch script: only what the nodes wrote is left."""
    start.begin()
    played.written(RunOutcome(Status.INTERRUPTED, "n1: received SIGTERM", "Interrupted"))
    shown = played.described()
    assert "attempt 1 ended: interrupted: Interrupted: n1: received SIGTERM" in shown
    assert "failed" not in shown
    assert start.begin(job=6)["PMD_ATTEMPT"] == "2", "submitted again, it goes on"
    assert played.outcomes() == ["interrupted", None]


def test_a_job_that_is_cancelled_while_its_script_ends_is_not_requeued(played: Played, start: Start) -> None:
    start.begin()
    played.written(RunOutcome(Status.INTERRUPTED, "n1: received SIGTERM", "Interrupted"))
    played.job_state("COMPLETING")
    assert start.end(143) == 130
    assert played.calls("requeue") == []
    assert played.history().stopped is None


@pytest.mark.parametrize("word", ["SIGNALING", "SUSPENDED", "RESIZING", "STOPPED"])
def test_a_job_that_slurm_has_not_ended_is_requeued(played: Played, start: Start, word: str) -> None:
    """SIGNALING: Slurm is still sending USR1, for which the run saved."""
    start.begin()
    played.written(SAVED)
    played.job_state(word)
    assert start.end(0) == 75
    assert played.calls("requeue") == ["requeue 5"]


@pytest.mark.parametrize("word", ["COMPLETING", "NODE_FAIL", "REQUEUED", "PENDING"])
def test_a_failing_job_that_slurm_has_ended_itself_is_left_to_slurm(
    played: Played, start: Start, word: str
) -> None:
    """A lost node: Slurm requeues the job, and a second requeue would be an error."""
    start.begin()
    played.written(FAILED)
    played.job_state(word)
    assert start.end(1) == 1
    assert played.calls("requeue") == []
    assert start.begin(restarts=1)["PMD_ATTEMPT"] == "2"


def test_a_job_that_was_ended_while_slurm_does_not_answer_does_not_come_back(
    played: Played, start: Start
) -> None:
    start.begin()
    played.written(RunOutcome(Status.INTERRUPTED, "n1: received SIGTERM", "Interrupted"))
    played.program("scontrol", "echo 'Unable to contact slurm controller (connect failure)' >&2; exit 1")
    assert start.end(130) == 130
    assert played.outcomes() == ["interrupted"] and "Unable to contact" in start.log
    assert played.calls("requeue") == []


def test_sigterm_in_a_job_that_nobody_cancelled_is_a_failure(played: Played, start: Start) -> None:
    """The kernel killed the process of one node for its memory, so srun ended the other node's."""
    start.begin()
    played.written(RunOutcome(Status.INTERRUPTED, "n1: received SIGTERM", "Interrupted"))
    assert start.end(137) == 1
    assert played.calls("requeue") == ["requeue 5"]
    outcome = RunOutcome.read(played.state / "outcome.json")
    assert outcome is not None and outcome.status is Status.FAILED
    assert "ended with exit code 137, and nobody cancelled the job" in outcome.reason


def test_preemptions_are_not_counted_as_crashes(played: Played, start: Start) -> None:
    start.monkeypatch.setenv("PMD_MAX_CRASHES", "1")
    for restarts in range(3):
        start.begin(restarts=restarts)
        played.written(RunOutcome(Status.INTERRUPTED, "n1: received SIGTERM", "Interrupted"))
    assert start.begin(restarts=3)["PMD_ATTEMPT"] == "4"
    assert played.outcomes() == ["interrupted"] * 3 + [None]


def test_a_job_that_ends_in_the_grace_of_a_preemption_is_requeued_and_has_not_crashed(
    played: Played, start: Start
) -> None:
    """Slurm sends SIGTERM, and calls the job RUNNING until its time of grace is over."""
    start.monkeypatch.setenv("PMD_MAX_CRASHES", "1")
    start.begin()
    played.written(RunOutcome(Status.INTERRUPTED, "n1: received SIGTERM", "Interrupted"))
    played.job_state("RUNNING", preempted="2026-05-01T09:00:00")
    assert start.end(130) == 130
    assert played.calls("requeue") == ["requeue 5"]
    assert start.begin(restarts=1)["PMD_ATTEMPT"] == "2"
    assert played.outcomes() == ["interrupted", None]


def test_a_chain_ends_with_0_where_an_earlier_job_completed_the_run(played: Played, start: Start) -> None:
    start.begin()
    played.written(RunOutcome(Status.COMPLETE))
    start.end(0)
    assert start.begin(job=6, link=1) == {"exit": "0"}
    assert start.log == "megatron-pmd: not started: an earlier job of this chain completed the run\n"


def test_a_chain_ends_with_1_where_an_earlier_job_was_stopped(played: Played, start: Start) -> None:
    start.begin()
    played.written(RunOutcome(Status.REFUSED, "n1: no such file", "DataError"))
    start.end(1)
    for job in (6, 7):
        assert start.begin(job=job, link=job - 5) == {"exit": "1"}
        assert "an earlier job of this chain stopped: refused: DataError: n1: no such file" in start.log
    assert len(played.history().attempts) == 1


def test_a_chain_goes_on_where_the_job_before_was_ended_by_its_time(played: Played, start: Start) -> None:
    """Each job of a chain counts from nothing; its attempts, and so its logs, have numbers of their own."""
    start.monkeypatch.setenv("PMD_MAX_ATTEMPTS", "1")
    start.begin()
    assert start.begin(job=6, link=1)["PMD_ATTEMPT"] == "2"
    assert start.begin(job=7, link=2)["PMD_ATTEMPT"] == "3"


def test_a_run_that_was_stopped_starts_again_when_a_person_submits_it(played: Played, start: Start) -> None:
    start.monkeypatch.setenv("PMD_MAX_CRASHES", "1")
    start.begin()
    played.written(FAILED)
    start.end(1)
    assert "stopped: crashed 1 times" in played.described()
    assert start.begin(job=6)["PMD_ATTEMPT"] == "2"
    assert played.history().stopped is None and "stopped:" not in played.described()


def test_on_a_cluster_that_forbids_requeuing_the_next_job_of_a_chain_goes_on(
    played: Played, start: Start
) -> None:
    start.begin()
    played.written(SAVED)
    (played.folder / "no_requeue").write_text(
        "slurm_requeue error: Requested operation is presently disabled"
    )
    assert start.end(0) == 1
    said = "could not be requeued; the next job of its chain goes on, or submit it again: "
    assert said in start.log and "presently disabled" in start.log
    assert said in played.described()
    assert start.begin(job=6, link=1)["PMD_ATTEMPT"] == "2"
    assert said not in played.described()


@pytest.mark.parametrize("name", ["PMD_RANKS_PER_NODE", "PMD_MAX_CRASHES"])
def test_a_number_that_is_none_ends_the_job_before_its_nodes_start(
    start: Start, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    start.monkeypatch.setenv(name, "8x")
    assert main(["begin"]) == 2
    assert f"{name}=8x is not a whole number" in capsys.readouterr().err


def test_nodes_that_the_profile_excludes_stay_out_at_a_requeue(played: Played, start: Start) -> None:
    start.monkeypatch.setenv("PMD_EXCLUDED_NODES", "n[7-9]")
    start.begin()
    (played.state / "bad_nodes").write_text("n2\n")
    played.written(FAILED)
    start.end(1)
    assert played.calls("update") == ["update JobId=5 ExcNodeList=n[7-9],n2"]


def test_only_a_complete_run_and_one_that_was_asked_for_no_more_exit_with_0() -> None:
    codes = {
        status: after_end(
            History(), RunOutcome(status), checkpoint=None, limits=Limits(), slurm_ended_it=ended
        ).exit_code
        for status in Status
        for ended in (False, True)
    }
    assert [status for status, code in codes.items() if code == 0] == [Status.COMPLETE, Status.STOPPED]
    assert codes == EXIT_CODES


def test_a_lost_node_explains_what_the_others_say() -> None:
    interrupted = RunOutcome(Status.INTERRUPTED, "n2: received SIGTERM", "Interrupted")
    lost = judge(interrupted, exit_code=None, slurm_ended_it=True, given_up=["n1"])
    assert lost == RunOutcome(Status.FAILED, "lost: n1")
    assert judge(interrupted, exit_code=None, slurm_ended_it=True) == interrupted
    for outcome in (FAILED, SAVED, RunOutcome(Status.COMPLETE)):
        assert judge(outcome, exit_code=None, slurm_ended_it=True, given_up=["n1"]) == outcome


def test_a_first_submission_runs_whatever_was_before() -> None:
    stopped = History(stopped="refused: ConfigError")
    decision = before_start(stopped, restart=False, chain_link=False, checkpoint=None, limits=Limits())
    assert decision.action is Action.RUN


def test_the_table_has_every_outcome_and_its_exit_code() -> None:
    page = (PROJECT / "docs" / "slurm.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \|", page[page.index("## How a run ends") :], re.MULTILINE)
    assert {word: int(code) for word, code in rows} == {s.value: code for s, code in EXIT_CODES.items()}
