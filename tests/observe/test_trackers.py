"""TensorBoard, W&B and MLflow by their own readers: one record for a run, also when it was resumed."""

from __future__ import annotations

import importlib.util
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_pmd.config import Trackers, override
from megatron_pmd.errors import DataError, Interrupted, MissingPackage, PmdError
from megatron_pmd.observe import trackers
from megatron_pmd.observe.journal import Journal
from megatron_pmd.observe.trackers import Tracker, check_trackers
from megatron_pmd.outcome import RunOutcome, Status
from recipes import recipe
from tests.observe.synthetic_run import STEPS, make_config, run_iterations
from tests.test_tutorials import blocks

ALL = {
    "tensorboard": True,
    "wandb": {"project": "tests"},
    "mlflow": {"experiment": "tests"},
    "sampled_groups": 2,
}


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two iterations, of which the second was lost, then that one again and one more; all trackers are on."""
    folder = tmp_path_factory.mktemp("tracked") / "run"
    config = make_config(trackers=ALL)
    for first, stop, ending in ((0, 2, Status.FAILED), (1, 3, Status.COMPLETE)):
        journal = Journal.open(folder, config, first)
        run_iterations(journal, first, stop)
        journal.finish(RunOutcome(ending))
    return folder


def expected(kind: str, key: str, folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    axis = "global_step" if kind == "step" else "iteration"
    return {line[axis]: line[key] for line in lines if line["kind"] == kind}


def test_a_run_has_no_tracker_unless_it_asks_for_one(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "run", make_config(), 0)
    run_iterations(journal, 0, 1)
    journal.finish(RunOutcome(Status.COMPLETE))
    assert not {"tensorboard", "wandb", "mlflow"} & {path.name for path in (tmp_path / "run").iterdir()}


def test_tensorboard_shows_a_resumed_run_once_and_its_samples_as_a_table(resumed: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for kind, tag, places in (("step", "gradient_norm", 3 * STEPS), ("iteration", "reward", 3)):
        events = EventAccumulator(str(resumed / "tensorboard" / kind)).Reload()
        assert [event.step for event in events.Scalars(tag)] == list(range(places))
    texts = events.Tensors("samples/text_summary")
    assert {text.step for text in texts} == {0, 1, 2}  # TensorBoard keeps texts of a lost iteration
    shown = texts[-1].tensor_proto.string_val[0].decode()
    assert shown.startswith("|group|number|") and shown.count("\n") == 1 + 2 * 4


def test_mlflow_reads_one_run_with_every_metric_its_settings_and_samples(resumed: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient((resumed / "mlflow").as_uri())
    experiment = client.get_experiment_by_name("tests")
    assert experiment is not None
    [run] = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("synthetic", "FINISHED")
    assert run.data.params["batch.prompts_per_step"] == "4"
    for kind, key in (("step", "gradient_norm"), ("iteration", "reward"), ("evaluation", "mean_at_k")):
        history = client.get_metric_history(run.info.run_id, f"{kind}/{key}")
        assert {entry.step: entry.value for entry in history} == pytest.approx(expected(kind, key, resumed))
    artifacts = {artifact.path for artifact in client.list_artifacts(run.info.run_id, "samples")}
    assert artifacts == {
        f"samples/{name}.json" for name in ("iteration-0", "iteration-1", "iteration-2", "evaluation-0")
    }
    table = json.loads(
        Path(client.download_artifacts(run.info.run_id, "samples/iteration-2.json")).read_text()
    )
    assert table["columns"][:3] == ["group", "number", "branch"] and len(table["data"]) == 2 * 4


def records(file: Path) -> Iterator[bytes]:
    """Of a `.wandb` file, which `wandb sync` sends: LevelDB's log format behind a header of 7 bytes.

    W&B's own reader is a program of another language, which sends what it reads.
    """
    data, place, parts = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # the rest of a block that holds no further record
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def test_wandb_writes_the_parts_of_a_resumed_run_under_one_id(resumed: Path) -> None:
    from wandb.proto import wandb_internal_pb2

    ids, rows, tables, endings = set(), {}, 0, []
    files = sorted((resumed / "wandb").glob("offline-run-*/*.wandb"))
    for data in (data for file in files for data in records(file)):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("run"):
            ids.add((record.run.run_id, record.run.project, record.run.display_name))
        if record.HasField("exit"):
            endings.append(record.exit.exit_code)
        line: dict[str, Any] = {
            item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
        }
        if "iteration/reward" in line:
            rows[line["iteration/iteration"]] = line["iteration/reward"]
        tables += "iteration/samples/_type" in line
    [(found, project, name)] = ids
    assert (project, name) == ("tests", "synthetic") and found == (resumed / "wandb_id.txt").read_text()
    assert len(files) == 2 and tables == 4 and sorted(endings) == [0, 1]
    assert rows == pytest.approx(expected("iteration", "reward", resumed))


def test_mlflow_says_how_each_start_of_a_run_ended(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    folder, config = tmp_path / "run", make_config(trackers={"mlflow": {"experiment": "x"}})
    found = {}
    for status in (Status.STOPPED, Status.SAVED, Status.ALARMED):
        Journal.open(folder, config, 0).finish(RunOutcome(status))
        number = (folder / "mlflow_id.txt").read_text().splitlines()[0]
        found[status.value] = MlflowClient((folder / "mlflow").as_uri()).get_run(number).info.status
    assert found == {"stopped": "FINISHED", "saved": "KILLED", "alarmed": "FAILED"}


def test_mlflow_opens_a_new_record_where_the_server_or_the_experiment_is_another(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    folder, there = tmp_path / "run", (tmp_path / "server").as_uri()

    def runs(uri: str, experiment: str) -> list[str]:
        found = MlflowClient(uri).get_experiment_by_name(experiment)
        assert found is not None
        return [run.info.run_id for run in MlflowClient(uri).search_runs([found.experiment_id])]

    def start(experiment: str, **uri: str) -> str:
        """The number of the record that this start of the run is in."""
        config = make_config(trackers={"mlflow": {"experiment": experiment, **uri}})
        Journal.open(folder, config, 0).close()
        return (folder / "mlflow_id.txt").read_text().splitlines()[0]

    begun = start("x")
    (folder / "mlflow_id.txt").write_text(begun)  # as an earlier version wrote it
    assert start("x") == begun, "it is still read"
    elsewhere = start("x", uri=there)
    other = start("y", uri=there)
    assert start("y", uri=there) == other
    assert runs((folder / "mlflow").as_uri(), "x") == [begun]
    assert (runs(there, "x"), runs(there, "y")) == ([elsewhere], [other])


class Failing(Tracker):
    """In the place of another; its server has gone at the second line, or at the end."""

    def __init__(self, *_: Any) -> None:
        self.lines = 0

    def log(self, kind: str, place: int, values: dict[str, float]) -> None:
        self.lines += 1
        if self.lines == 2:
            raise ConnectionError("no route to host")
        assert self.lines == 1, "it is asked for nothing more"

    def show(self, kind: str, place: int, table: Any) -> None: ...

    def close(self, outcome: RunOutcome) -> None:
        raise TimeoutError("no answer")


@pytest.mark.parametrize(
    ("iterations", "failure"), [(2, "ConnectionError: no route to host"), (0, "TimeoutError: no answer")]
)
def test_a_tracker_that_fails_is_turned_off_and_the_run_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, iterations: int, failure: str
) -> None:
    class Noted(Failing):
        def log(self, kind: str, place: int, values: dict[str, float]) -> None:
            self.lines += 1

        def close(self, outcome: RunOutcome) -> None:
            noted.append((self.lines, outcome.status, (tmp_path / "run/summary.json").exists()))

    said, noted = list[str](), list[tuple[int, Status, bool]]()
    monkeypatch.setattr(trackers, "WeightsAndBiases", Failing)
    monkeypatch.setattr(trackers, "MlflowTracker", Noted)
    journal = Journal.open(
        tmp_path / "run", make_config(trackers=ALL | {"tensorboard": False}), 0, say=said.append
    )
    run_iterations(journal, 0, iterations)
    journal.finish(RunOutcome(Status.COMPLETE))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().count("\n")
    assert noted == [(lines, Status.COMPLETE, True)] and bool(lines) == bool(iterations)
    [told] = said
    assert f"trackers.wandb has failed and is off until the next start of this run: {failure}" in told


def test_samples_that_cannot_be_read_end_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def torn(*_: Any) -> None:
        raise DataError("0.parquet: not a rollout file")

    said = list[str]()
    monkeypatch.setattr(trackers.TrackerSet, "_table", torn)
    journal = Journal.open(tmp_path / "run", make_config(trackers={"tensorboard": True}), 0, say=said.append)
    run_iterations(journal, 0, 1)
    journal.finish(RunOutcome(Status.COMPLETE))
    assert "trackers.tensorboard has failed" in said[0] and "not a rollout file" in said[0]


def test_the_signal_that_ends_a_run_is_no_failure_of_a_tracker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Signalled(Failing):
        def log(self, kind: str, place: int, values: dict[str, float]) -> None:
            raise Interrupted("received SIGTERM")

    monkeypatch.setattr(trackers, "MlflowTracker", Signalled)
    journal = Journal.open(tmp_path / "run", make_config(trackers={"mlflow": {"experiment": "x"}}), 0)
    with pytest.raises(Interrupted):
        run_iterations(journal, 0, 1)


@pytest.mark.parametrize(
    ("settings", "package", "extra"),
    [({"wandb": {"project": "x"}}, "wandb", "trackers"), ({"tensorboard": True}, "tensorboard", "cpu")],
)
def test_a_tracker_without_its_package_is_named_with_what_installs_it(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], package: str, extra: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = rf"trackers\.{package} needs {package}, .*'megatron-pmd\[{extra}\]'"
    with pytest.raises(MissingPackage, match=message):
        check_trackers(Trackers.model_validate(settings))
    check_trackers(Trackers())


def test_a_server_that_does_not_answer_is_named_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    config = make_config(trackers={"mlflow": {"experiment": "x", "uri": "http://127.0.0.1:9"}})
    with pytest.raises(PmdError, match=r"trackers\.mlflow: the record cannot be opened: .*a network"):
        Journal.open(tmp_path / "run", config, 0)


def test_trackers_may_change_at_a_resume(tmp_path: Path) -> None:
    Journal.open(tmp_path / "run", make_config(trackers={"tensorboard": True}), 0).close()
    Journal.open(tmp_path / "run", make_config(), 1).close()


def test_the_page_turns_on_each_tracker_with_the_settings_that_it_shows(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from megatron_pmd.cli.main import app

    [commands] = [block.text for block in blocks("docs/trackers.md") if block.language == "bash"]
    for command in commands.splitlines():
        program, *words = command.split()
        assert program == "megatron-pmd"
        app(words, standalone_mode=False)
        config = override(recipe("tiny_moe_cpu"), words[2:])
        assert config.trackers != Trackers(), command
    assert "tiny_moe_cpu" in capsys.readouterr().out
