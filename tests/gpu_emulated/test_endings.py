"""What goes wrong on a device ends a run by name."""

from __future__ import annotations

import json

import pytest

from tests.gpu_emulated.runs import Runs


@pytest.fixture(scope="module")
def runs(models, tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("endings"), models / "dense for fp8", dict(data=2), [])


def ended(runs, name, *words, **variables):
    """Exit code, and what the run's summary says."""
    done = runs.train(name, *words, **variables)
    summary = runs.folder / "runs" / name / "summary.json"
    return done, json.loads(summary.read_text()) if summary.exists() else {}


@pytest.mark.long
def test_a_gradient_that_is_not_finite_ends_the_run_as_such(runs):
    done, summary = ended(runs, "nan", "optimizer.learning_rate=1e30", "optimizer.gradient_clip=1e30")
    assert done.returncode == 1
    assert "NonFiniteLoss" in done.stdout + done.stderr and "gradient norm" in summary["reason"]


@pytest.mark.long
def test_an_alarm_whose_action_is_to_stop_ends_the_run_as_alarmed(runs):
    words = ("alarms.entropy_collapse.threshold=2", "alarms.entropy_collapse.action=stop")
    done, summary = ended(runs, "alarmed", *words)
    assert done.returncode == 3, done.stderr[-3000:]
    assert summary["status"] == "alarmed" and "entropy_collapse" in summary["reason"]


@pytest.mark.long  # the core has it by phase: test_memory.py
def test_a_device_that_is_too_small_is_named(runs):
    done, summary = ended(runs, "small", EMULATED_CUDA_BYTES=str(12 * 2**20))
    assert done.returncode == 1
    assert "DeviceFull" in done.stdout + done.stderr
    assert "start: of the" in summary["reason"]


def test_a_rank_that_is_killed_is_named_and_not_the_one_that_waits_for_it(runs):
    done, summary = ended(runs, "dying", "algorithm.objective.name=tests.gpu_emulated.objectives:Dying")
    assert done.returncode == 1
    assert "rank 1 failed: it ended with SIGKILL" in done.stdout + done.stderr
    assert "SIGKILL" in summary["reason"]
