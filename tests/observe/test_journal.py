"""The run directory against a reader of our own: json.loads on raw lines, TensorBoard's own event reader."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_pmd.errors import ConfigError, DataError
from megatron_pmd.files import read_records
from megatron_pmd.observe.folder import RunFolder
from megatron_pmd.observe.journal import Journal
from megatron_pmd.outcome import RunOutcome, Status
from tests.observe.synthetic_run import STEPS, make_config, run_iterations


def lines(path: Path) -> list[dict[str, Any]]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_a_resumed_run_has_every_line_once(tmp_path):
    config = make_config()
    journal = Journal.open(tmp_path / "run", config, 0)
    run_iterations(journal, 0, 5)
    journal.close()  # killed after iteration 4; the last checkpoint is from before iteration 3

    journal = Journal.open(tmp_path / "run", config, 3)
    run_iterations(journal, 3, 6)
    journal.finish(RunOutcome(Status.COMPLETE))

    metrics = lines(tmp_path / "run/metrics.jsonl")
    steps = [m["global_step"] for m in metrics if m["kind"] == "step"]
    assert steps == list(range(6 * STEPS))
    assert [m["iteration"] for m in metrics if m["kind"] == "iteration"] == list(range(6))
    assert [m["iteration"] for m in metrics if m["kind"] == "evaluation"] == [0, 3]
    ledger = lines(tmp_path / "run/ledger.jsonl")
    assert [p["iteration"] for p in ledger if p["phase"] == "sync"] == list(range(6))


def test_the_warm_start_is_kept_on_resume_and_dropped_when_the_run_begins_again(tmp_path):
    config = make_config()
    journal = Journal.open(tmp_path / "run", config, 0)
    journal.log("warm_start", {"step": 0, "loss": 2.0})
    run_iterations(journal, 0, 2)
    journal.close()
    Journal.open(tmp_path / "run", config, 1).close()
    assert [m["kind"] for m in lines(tmp_path / "run/metrics.jsonl")].count("warm_start") == 1
    Journal.open(tmp_path / "run", config, 0).close()
    assert lines(tmp_path / "run/metrics.jsonl") == []


def test_a_line_cut_off_by_a_kill_is_left_out(tmp_path):
    config = make_config()
    journal = Journal.open(tmp_path / "run", config, 0)
    run_iterations(journal, 0, 2)
    journal.close()
    for name in ("metrics.jsonl", "ledger.jsonl"):
        with (tmp_path / "run" / name).open("a") as file:
            file.write('{"kind": "step", "iteration": 1, "phase": "roll')
    assert len(RunFolder.read(tmp_path / "run").iterations) == 2

    journal = Journal.open(tmp_path / "run", config, 2)
    run_iterations(journal, 2, 3)
    journal.close()
    assert [m["iteration"] for m in lines(tmp_path / "run/metrics.jsonl") if m["kind"] == "iteration"] == [
        0,
        1,
        2,
    ]
    assert [p["phase"] for p in lines(tmp_path / "run/ledger.jsonl")].count("rollout") == 3


def test_a_broken_line_in_the_middle_is_an_error_that_names_the_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"a": 1}\n{"a":\n{"a": 3}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 2"):
        read_records(path)


def trained(folder: Path) -> None:
    """A run that was killed in its first iteration."""
    journal = Journal.open(folder, make_config(), 0)
    journal.log("step", {"global_step": 0, "loss": 1.0})
    journal.close()


def test_a_start_that_failed_before_it_trained_does_not_keep_the_name(tmp_path):
    """Only the warm start of it is there: the next start begins anew in any case."""
    journal = Journal.open(tmp_path / "run", make_config(), 0)
    journal.log("warm_start", {"step": 0, "loss": 2.0})
    journal.close()
    other = make_config(seed=7)
    Journal.open(tmp_path / "run", other, 0).close()
    assert RunFolder.read(tmp_path / "run").config == other.model_dump(mode="json")
    assert lines(tmp_path / "run/metrics.jsonl") == []


def test_a_checkpoint_keeps_the_name_also_before_the_first_step(tmp_path):
    """A rollout that was cut short is in the checkpoint of iteration 0."""
    Journal.open(tmp_path / "run", make_config(), 0).close()
    with pytest.raises(ConfigError, match="seed: 0 there, 7 here"):
        Journal.open(tmp_path / "run", make_config(seed=7), 0, keep_warm_start=True)


def test_another_configuration_in_the_same_folder_is_refused_with_the_differing_keys(tmp_path):
    trained(tmp_path / "run")
    other = make_config(optimizer={"learning_rate": 2e-5}, seed=7)
    with pytest.raises(ConfigError) as error:
        Journal.open(tmp_path / "run", other, 0)
    assert "optimizer.learning_rate: 1e-05 there, 2e-05 here" in str(error.value)
    assert "seed: 0 there, 7 here" in str(error.value)
    assert "batch" not in str(error.value)


def test_a_key_that_the_recorded_configuration_lacks_is_named(tmp_path):
    trained(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"actor\.megatron\.moe_z_loss_coeff: absent there, 0\.1 here"):
        config = make_config(actor={"megatron": {"moe_z_loss_coeff": 0.1}})
        Journal.open(tmp_path / "run", config, 0)


def test_iterations_may_grow_but_not_shrink(tmp_path):
    Journal.open(tmp_path / "run", make_config(iterations=6), 0).close()
    Journal.open(tmp_path / "run", make_config(iterations=9), 6).close()
    assert json.loads((tmp_path / "run/config.json").read_text())["iterations"] == 9
    with pytest.raises(ConfigError, match="iterations: 9 there, 6 here"):
        Journal.open(tmp_path / "run", make_config(iterations=6), 6)


def test_resuming_where_no_run_is_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="holds no run"):
        Journal.open(tmp_path / "run", make_config(), 3)


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), torch.tensor(float("nan")), torch.tensor(-1.0).log()]
)
def test_non_finite_values_become_null(tmp_path, value):
    journal = Journal.open(tmp_path / "run", make_config(), 0)
    journal.log("step", {"step": 0, "global_step": 0, "loss": value, "gradient_norm": torch.tensor(2.0)})
    journal.finish(RunOutcome(Status.FAILED, "iteration 0, step 0", "NonFiniteLoss"))
    (line,) = lines(tmp_path / "run/metrics.jsonl")
    assert line["loss"] is None
    assert line["gradient_norm"] == 2.0


def test_a_metrics_line_without_its_place_is_refused(tmp_path):
    journal = Journal.open(tmp_path / "run", make_config(), 0)
    with pytest.raises(ValueError, match="global_step"):
        journal.log("step", {"step": 0, "loss": 1.0})
    journal.close()


def test_a_phase_is_timed_and_its_bandwidth_follows_from_its_bytes(tmp_path):
    journal = Journal.open(tmp_path / "run", make_config(), 0)
    journal.iteration(4)
    with journal.phase("sync") as phase:
        time.sleep(0.05)
        phase.bytes = 50_000_000
    journal.close()
    (line,) = lines(tmp_path / "run/ledger.jsonl")
    assert line["iteration"] == 4
    assert 0.05 <= line["seconds"] < 1
    assert line["gigabytes_per_second"] == pytest.approx(0.05 / line["seconds"], rel=1e-3)


def test_a_phase_that_fails_is_in_the_ledger_with_its_error(tmp_path):
    journal = Journal.open(tmp_path / "run", make_config(), 0)
    with pytest.raises(KeyError), journal.phase("update"):
        raise KeyError("weight")
    with journal.phase("save"):
        pass
    journal.close()
    assert [line.get("error") for line in lines(tmp_path / "run/ledger.jsonl")] == ["KeyError", None]


def test_no_phase_hides_in_another(tmp_path):
    journal = Journal.open(tmp_path / "run", make_config(), 0)
    nested = pytest.raises(RuntimeError, match="'anchor' inside phase 'update'")
    with nested, journal.phase("update"), journal.phase("anchor"):
        pass
    journal.close()


def test_the_summary_says_how_the_run_ended(make_run):
    summary = json.loads((make_run() / "summary.json").read_text())
    assert summary["status"] == "complete"
    assert summary["iterations"] == summary["iterations_planned"] == 6
    assert summary["first_reward"] == pytest.approx(0.2)
    assert summary["last_reward"] == pytest.approx(0.5)
    assert [e["iteration"] for e in summary["evaluations"]] == [0, 3, 6]
    assert set(summary["seconds_by_phase"]) >= {"start", "evaluate", "rollout", "sync"}
    assert summary["error"] is None


def test_a_run_under_way_has_no_summary_of_an_earlier_start(make_run):
    folder = make_run()
    Journal.open(folder, make_config(iterations=8), 6).close()
    assert not (folder / "summary.json").exists()


def test_versions_of_an_earlier_start_stay_listed(tmp_path):
    Journal.open(tmp_path / "run", make_config(), 0).close()
    path = tmp_path / "run/versions.json"
    recorded = json.loads(path.read_text())
    assert recorded["packages"]["torch"] == torch.__version__.partition("+")[0]
    path.write_text(json.dumps({**recorded, "python": "3.9.0"}))
    Journal.open(tmp_path / "run", make_config(), 0).close()
    again = json.loads(path.read_text())
    assert again["python"] == recorded["python"]
    assert [e["python"] for e in again["earlier_starts"]] == ["3.9.0"]
