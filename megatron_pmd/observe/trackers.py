"""TensorBoard, W&B and MLflow: each shows what the journal logs, and goes on in its record at a resume."""

from __future__ import annotations

import importlib.util
import json
import os
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_pmd.config import Mlflow, RunConfig, Trackers, Wandb
from megatron_pmd.errors import Interrupted, MissingPackage, PmdError
from megatron_pmd.files import JsonObject, write_whole
from megatron_pmd.observe.folder import flatten
from megatron_pmd.observe.samples import table_of_samples
from megatron_pmd.outcome import RunOutcome, Status

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

AXIS: dict[str, str] = {
    "step": "global_step",
    "iteration": "iteration",
    "evaluation": "iteration",
    "warm_start": "step",
}
"""Kind of line -> its value on the horizontal axis."""
SAMPLES = {"iteration": "rollouts", "evaluation": "evaluations"}
"""Kind of line -> folder of the samples that it is about."""
PLACES = ("kind", "iteration", "step", "global_step")
WANDB_ID, MLFLOW_ID = "wandb_id.txt", "mlflow_id.txt"
"""In the run's folder: which record a resumed run goes on in. MLflow's has a second line: where that is."""
EXTRAS = {"tensorboard": "cpu", "wandb": "trackers", "mlflow": "trackers"}
"""Setting, which has the name of the package that it needs -> the extra that installs it."""
MLFLOW_ENDINGS = {
    Status.COMPLETE: "FINISHED",
    Status.STOPPED: "FINISHED",
    Status.SAVED: "KILLED",
    Status.INTERRUPTED: "KILLED",
}
"""What MLflow calls how a run ended; every other ending is FAILED."""

Table = tuple[list[str], list[list[Any]]]
"""Names of the columns, and the rows."""


class Tracker(ABC):
    """One record of the run."""

    @abstractmethod
    def log(self, kind: str, place: int, values: dict[str, float]) -> None:
        """Numbers of one line of metrics.jsonl. place: its value on the horizontal axis, see AXIS."""

    @abstractmethod
    def show(self, kind: str, place: int, table: Table) -> None:
        """A few samples of a rollout or evaluation."""

    @abstractmethod
    def close(self, outcome: RunOutcome) -> None:
        """Everything is written, and the record says how the run ended; no call follows."""


def check_trackers(trackers: Trackers) -> None:
    """MissingPackage where the package of a tracker that is on is not installed."""
    for package, extra in EXTRAS.items():
        if getattr(trackers, package) and importlib.util.find_spec(package) is None:
            raise MissingPackage(
                f"trackers.{package} needs {package}, which is not installed: "
                f"pip install 'megatron-pmd[{extra}]', or remove the setting"
            )


class TrackerSet:
    """All trackers that are on. One that fails is turned off: a run does not end for what shows it."""

    def __init__(
        self, folder: Path, config: RunConfig, logged: dict[str, int], say: Callable[[str], None]
    ) -> None:
        """folder: the run's. logged: the last place of each kind of line; a resumed run goes on behind it.

        say: to the user, that a tracker has failed. PmdError where a record cannot be opened.
        """
        self._folder, self._config, self._logged, self._say = folder, config, logged, say
        self._opened = dict(self._open())

    def log(self, kind: str, line: JsonObject) -> None:
        """The numbers of a line of metrics.jsonl, and samples of the file that it is about."""
        if not self._opened:
            return
        place = line[AXIS[kind]]
        values = {
            key: float(value)
            for key, value in line.items()
            if key not in PLACES and isinstance(value, (int, float))
        }
        table: Table | None = None
        for setting, tracker in list(self._opened.items()):
            with self._spared(setting):
                tracker.log(kind, place, values)
                table = table or self._table(kind, place)
                if table:
                    tracker.show(kind, place, table)

    @contextmanager
    def _spared(self, setting: str) -> Iterator[None]:
        """Around what one tracker does: its failure is told once, and it is asked for nothing more."""
        try:
            yield
        except Interrupted:  # by the signal that ends the run, in the midst of it
            raise
        except Exception as error:
            del self._opened[setting]
            self._say(
                f"warning: trackers.{setting} has failed and is off until the next start of this run: "
                f"{type(error).__name__}: {error}; metrics.jsonl has every number"
            )

    def _table(self, kind: str, place: int) -> Table | None:
        if kind not in SAMPLES:
            return None
        file = self._folder / SAMPLES[kind] / f"{place}.parquet"
        return table_of_samples(file, self._config.trackers.sampled_groups) if file.is_file() else None

    def _open(self) -> Iterator[tuple[str, Tracker]]:
        trackers = self._config.trackers
        if trackers.tensorboard:
            yield "tensorboard", TensorBoard(self._folder, self._logged)
        if trackers.wandb:
            yield "wandb", WeightsAndBiases(self._folder, self._config, trackers.wandb)
        if trackers.mlflow:
            yield "mlflow", MlflowTracker(self._folder, self._config, trackers.mlflow)

    def close(self, outcome: RunOutcome) -> None:
        for setting, tracker in list(self._opened.items()):
            with self._spared(setting):
                tracker.close(outcome)
        self._opened = {}


class TensorBoard(Tracker):
    """Event files in the run's folder; of what is logged again after a resume, the later one shows."""

    def __init__(self, folder: Path, logged: dict[str, int]) -> None:
        self._folder, self._logged = folder / "tensorboard", logged
        self._writers: dict[str, SummaryWriter] = {}

    def log(self, kind: str, place: int, values: dict[str, float]) -> None:
        for key, value in values.items():
            self._writer(kind).add_scalar(key, value, place)

    def show(self, kind: str, place: int, table: Table) -> None:
        names, rows = table
        cells = [[str(value).replace("|", "\\|").replace("\n", " ") for value in row] for row in rows]
        lines = ["|".join(row) for row in [names, ["---"] * len(names), *cells]]
        self._writer(kind).add_text("samples", "\n".join(f"|{line}|" for line in lines), place)

    def _writer(self, kind: str) -> SummaryWriter:
        if kind not in self._writers:
            # it takes seconds to import
            from torch.utils.tensorboard import SummaryWriter

            purged = 1 + self._logged.get(kind, -1)
            self._writers[kind] = SummaryWriter(str(self._folder / kind), purge_step=purged, flush_secs=30)
        return self._writers[kind]

    def close(self, outcome: RunOutcome) -> None:
        for writer in self._writers.values():
            writer.close()


class WeightsAndBiases(Tracker):
    """A run of W&B; offline, `wandb sync` joins the parts that several starts have written."""

    def __init__(self, folder: Path, config: RunConfig, settings: Wandb) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # else offline, too, it writes home of errors
        import wandb

        self._wandb, known = wandb, _read_id(folder / WANDB_ID)
        with _named("trackers.wandb"):
            self._run = wandb.init(
                project=settings.project,
                entity=settings.entity,
                name=config.name,
                id=known,
                resume="allow" if known else None,
                dir=folder,
                mode=settings.mode,
                config=flatten(config.model_dump(mode="json")),
                settings=wandb.Settings(silent=True, x_disable_stats=True, console="off"),
            )
        write_whole(folder / WANDB_ID, self._run.id)
        for kind in AXIS:
            self._run.define_metric(f"{kind}/*", step_metric=f"{kind}/{AXIS[kind]}")

    def log(self, kind: str, place: int, values: dict[str, float]) -> None:
        line = {f"{kind}/{key}": value for key, value in values.items()}
        self._run.log(line | {f"{kind}/{AXIS[kind]}": place})

    def show(self, kind: str, place: int, table: Table) -> None:
        names, rows = table
        shown = self._wandb.Table(columns=names, data=rows, allow_mixed_types=True)
        self._run.log({f"{kind}/samples": shown, f"{kind}/{AXIS[kind]}": place})

    def close(self, outcome: RunOutcome) -> None:
        self._run.finish(outcome.exit_code)


class MlflowTracker(Tracker):
    """A run of MLflow, on a server or in files."""

    def __init__(self, folder: Path, config: RunConfig, settings: Mlflow) -> None:
        # MLflow 3.17 refuses to write files unless it is told (tracking/_tracking_service/utils.py); its
        # databases need packages that mlflow-skinny does not bring
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # else it writes home of its use
        from mlflow import MlflowClient
        from mlflow.entities import Metric

        self._metric, record = Metric, folder / MLFLOW_ID
        where = settings.model_dump_json(include={"uri", "experiment"})
        known, _, there = (_read_id(record) or "").partition("\n")
        with warnings.catch_warnings(), _named("trackers.mlflow"):
            warnings.simplefilter("ignore")
            self._client = MlflowClient(settings.uri or (folder / "mlflow").resolve().as_uri())
            if known and there in ("", where):  # "": a file of an earlier version, the number alone
                self._id = self._client.get_run(known).info.run_id
                self._client.update_run(self._id, status="RUNNING")
            else:
                self._id = self._begun(settings.experiment, config)
        write_whole(record, f"{self._id}\n{where}\n")

    def _begun(self, experiment: str, config: RunConfig) -> str:
        """The number of a new record, which has the configuration."""
        from mlflow.entities import Param

        found = self._client.get_experiment_by_name(experiment)
        place = found.experiment_id if found else self._client.create_experiment(experiment)
        number: str = self._client.create_run(place, run_name=config.name).info.run_id
        leaves = flatten(config.model_dump(mode="json"))
        texts = [Param(key, json.dumps(value)) for key, value in leaves.items()]
        for first in range(0, len(texts), 100):  # the most that MLflow takes at a time
            self._client.log_batch(number, params=texts[first : first + 100])
        return number

    def log(self, kind: str, place: int, values: dict[str, float]) -> None:
        now = _milliseconds()
        numbers = [self._metric(f"{kind}/{key}", value, now, place) for key, value in values.items()]
        self._client.log_batch(self._id, metrics=numbers)

    def show(self, kind: str, place: int, table: Table) -> None:
        names, rows = table
        self._client.log_dict(self._id, {"columns": names, "data": rows}, f"samples/{kind}-{place}.json")

    def close(self, outcome: RunOutcome) -> None:
        self._client.set_terminated(self._id, MLFLOW_ENDINGS.get(outcome.status, "FAILED"))


def _read_id(path: Path) -> str | None:
    return path.read_text().strip() if path.is_file() else None


def _milliseconds() -> int:
    return time.time_ns() // 1_000_000


@contextmanager
def _named(setting: str) -> Iterator[None]:
    """Around what a tracker does at its start, where a wrong address, key or network shows."""
    try:
        yield
    except Exception as error:
        raise PmdError(
            f"{setting}: the record cannot be opened: {type(error).__name__}: {error}; is there a network, "
            "an account and its key? Without one, leave trackers.wandb.mode and trackers.mlflow.uri unset"
        ) from error
