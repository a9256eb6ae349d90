"""Recording runs in MLflow, from the driver alone, without ever holding up training."""

import json
import logging
import os
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

from cluster.errors import ClusterError
from cluster.tracking_uri import check_uri, shown, sqlite_path

METRICS_PER_BATCH, PARAMS_PER_BATCH, PARAM_LENGTH = 1000, 100, 6000  # MLflow's own limits
FLUSH_SECONDS = 1.0  # metrics of this long go up together
LONGEST_PAUSE = 30.0  # between two tries at a server that does not take them
REFUSED = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST", "PERMISSION_DENIED", "NOT_FOUND"}
IDENTITY = "mmada.identity"  # the tag of a run that can be found again without its id
STATUS = {"done": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}

# Where the user has not said otherwise. MLflow itself tries a request for minutes; here the writer tries again.
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
}


class Tracker:
    """One MLflow run.

    `start` and the constructor speak to the server and raise; after that everything is put in a queue that a thread
    writes, so a slow or dead server costs the caller nothing, and `finish` says what could not be written.

    Args:
        uri: "http://host:port", "sqlite:///file.db", or None for `mlflow.db` beside the run's folder.
        experiment: created when missing; with SQLite its artifacts lie in `mlartifacts` beside the database.
        run_dir: folder of the run.
        run_name: name of the run in MLflow.
        run_id: MLflow id of the run to continue, or None for a new one.
        system_metrics_seconds: interval at which CPU, memory, disk, network and GPU use of the driver are sampled;
            0 does not.
        parent_run_id: MLflow id of the run under which this one stands in the tree, or None.
        tags: set when the run is created or continued; a value is kept as its text.
        identity: a name that no other run of the experiment has; a run of this identity is continued where `run_id`
            is not known, so that whoever dies between making a run and remembering its id makes no second one.

    Raises:
        ClusterError: `uri` is malformed, or does not answer within ten seconds.
    """

    def __init__(
        self,
        uri: str | None,
        experiment: str,
        run_dir: Path,
        run_name: str,
        run_id: str | None = None,
        system_metrics_seconds: float = 10.0,
        parent_run_id: str | None = None,
        tags: Mapping[str, Any] | None = None,
        identity: str | None = None,
    ):
        self.run_dir = Path(run_dir).absolute()
        self.uri = uri or f"sqlite:///{self.run_dir.parent / 'mlflow.db'}"
        self.experiment = experiment
        self.run_name = run_name
        self.run_id = run_id
        self.system_metrics_seconds = system_metrics_seconds
        parent = {} if parent_run_id is None else {"mlflow.parentRunId": parent_run_id}
        self.identity = identity
        self._own_tags = {**(tags or {}), **parent}
        self._writer: _Writer | None = None
        self._monitor: Any = None
        self._client: Any = None
        check_uri(self.uri)

    def start(self, params: Mapping[str, Any]) -> str:
        """Create the run, or reopen it; returns its id.

        Args:
            params: the resolved recipe; nested mappings become names with dots. MLflow never changes a parameter:
                in a continued run a value that differs is recorded as the tag `resumed.<name>`.

        Raises:
            ClusterError: the server refuses, or has no run of this id.
        """
        mlflow = quiet_mlflow()
        with _refusal_named(self.uri, self.experiment):
            client = self._client = mlflow.MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)
            if self.run_id is None:
                self.run_id = find_or_make(client, self._experiment_id(client), self.run_name, self.identity)
            client.update_run(self.run_id, status="RUNNING")
            recorded = client.get_run(self.run_id).data.params
            flat = flatten(params)
            new = [mlflow.entities.Param(name, value) for name, value in flat.items() if name not in recorded]
            tags = {f"resumed.{name}": value for name, value in flat.items() if recorded.get(name, value) != value}
            for some in _batches(new, PARAMS_PER_BATCH):
                client.log_batch(self.run_id, params=some)
            for some in _batches(_tags({"run.dir": self.run_dir, **self._own_tags, **tags}), PARAMS_PER_BATCH):
                client.log_batch(self.run_id, tags=some)
        self._scratch = tempfile.TemporaryDirectory(prefix="mmada-figures-")
        self._writer = _Writer(client, self.run_id)
        self._writer.start()
        if self.system_metrics_seconds:
            self._monitor = _system_metrics(self.run_id, self.uri, self.system_metrics_seconds, self.log)
            self._monitor.start()
        return self.run_id

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record metrics of a step. Returns at once."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        values = [Metric(name, float(value), now, int(step)) for name, value in metrics.items()]
        self._put(_Item(f"metrics of step {step}", metrics=values))

    def steps_of(self, metric: str) -> set[int]:
        """Steps at which the started run has recorded a metric."""
        if self._writer is None or self.run_id is None:
            raise ValueError(f"steps_of({metric}) was asked of a tracker that is not started")
        with _refusal_named(self.uri, self.experiment):
            return {point.step for point in self._client.get_metric_history(self.run_id, metric)}

    def figure(self, name: str, figure: Any) -> None:
        """Record a Matplotlib figure as the artifact `figures/<name>.png`. It is drawn now and sent later."""
        path = Path(tempfile.mkdtemp(dir=self._scratch.name)) / f"{name}.png"
        figure.savefig(path, format="png", bbox_inches="tight")
        self._put(_Item(f"figure {name}", lambda client, run: client.log_artifact(run, str(path), "figures")))

    def checkpoint(self, path: Path, step: int, bytes: int) -> None:
        """Record where the newest checkpoint lies, as the tags `checkpoint.path`, `.step` and `.bytes`."""
        tags = {"checkpoint.path": path, "checkpoint.step": step, "checkpoint.bytes": bytes}
        self._put(_Item("checkpoint's location", lambda client, run: client.log_batch(run, tags=_tags(tags))))

    def tag(self, tags: Mapping[str, Any]) -> None:
        """Set tags of the run, for what was not known when its parameters were given."""
        self._put(_Item(f"tags {', '.join(tags)}", lambda client, run: client.log_batch(run, tags=_tags(tags))))

    def table(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Add rows, which have the same keys each time, to the table `tables/<name>.json`."""
        columns = {key: [row[key] for row in rows] for key in rows[0]} if rows else {}
        file = f"tables/{name}.json"
        self._put(_Item(f"rows of {file}", lambda client, run: client.log_table(run, columns, file)))

    def artifact(self, path: Path) -> None:
        """Record a file or a folder, as it is when its turn comes."""
        self._put(_Item(f"artifact {path}", lambda client, run: client.log_artifact(run, str(path))))

    def finish(self, status: str, timeout_s: float = 30.0) -> list[str]:
        """Write what is left and close the run.

        Args:
            status: "done", "failed" or "stopped" (by whoever compares runs, with nothing wrong).
            timeout_s: seconds to wait for the server; then the rest is given up.

        Returns:
            One line for each thing that could not be written; empty when all was, or `start` never came to its end.
        """
        end = STATUS[status]
        if self._writer is None:
            return []
        if self._monitor is not None:
            self._monitor.finish()
        self._put(_Item(f"the status {end}", lambda client, run: client.set_terminated(run, end)))
        lost = self._writer.close(timeout_s)
        self._writer = None
        self._scratch.cleanup()
        return lost

    def _put(self, item: "_Item") -> None:
        if self._writer is None:
            raise ValueError(f"{item.what} was given to a tracker that is not started")
        self._writer.put(item)

    def _experiment_id(self, client: Any) -> str:
        from mlflow.exceptions import MlflowException

        beside = sqlite_path(self.uri).parent / "mlartifacts"
        location = beside.as_uri() if self.uri.startswith("sqlite:") else None  # a server knows its own place
        found = client.get_experiment_by_name(self.experiment)
        if found is None:
            try:
                return client.create_experiment(self.experiment, artifact_location=location)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = client.get_experiment_by_name(self.experiment)  # another run was faster
        return found.experiment_id


def flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """{"train": {"steps": 20}} as {"train.steps": "20"}; lists as JSON. Values are cut at MLflow's 6000 characters."""
    flat: dict[str, str] = {}
    for name, value in params.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            text = json.dumps(value, default=str) if isinstance(value, (list, tuple, Mapping)) else str(value)
            flat[f"{prefix}{name}"] = text[:PARAM_LENGTH]
    return flat


def find_or_make(client: Any, experiment_id: str, name: str, identity: str | None) -> str:
    """Id of the experiment's run of that identity, made where there is none; without an identity always a new one."""
    tags = {} if identity is None else {IDENTITY: identity}
    for tag, value in tags.items():
        for run in client.search_runs([experiment_id], f"tags.`{tag}` = '{value}'", max_results=1):
            return run.info.run_id
    return client.create_run(experiment_id, run_name=name, tags=tags).info.run_id


@dataclass
class _Item:
    """Something to be written: metrics, or whatever `send(client, run_id)` does."""

    what: str
    send: Callable[[Any, str], object] | None = None
    metrics: list[Any] = field(default_factory=list)


class _Writer(threading.Thread):
    """Writes items in their order, trying again what the server does not take for the moment."""

    def __init__(self, client: Any, run_id: str):
        super().__init__(name="mlflow-writer", daemon=True)
        self._client = client
        self._run_id = run_id
        self._items: deque[_Item] = deque()  # what is being written stays in it until it is
        self._closing = threading.Event()
        self._given_up = threading.Event()
        self._trouble: Exception | None = None
        self._lost: list[str] = []

    def put(self, item: _Item) -> None:
        self._items.append(item)

    def close(self, timeout_s: float) -> list[str]:
        """Write the rest, for at most that long; one line for each thing that was not written."""
        self._closing.set()
        self.join(timeout_s)
        self._given_up.set()
        left = list(self._items)
        reason = f"not written within {timeout_s:g} s" + (f" ({_first_line(self._trouble)})" if self._trouble else "")
        steps = [metric.step for item in left for metric in item.metrics]
        told = [f"{len(steps)} metrics of steps {min(steps)} to {max(steps)}: {reason}"] if steps else []
        return self._lost + told + [f"{item.what}: {reason}" for item in left if not item.metrics]

    def run(self) -> None:
        closing = False
        while not closing:
            closing = self._closing.wait(FLUSH_SECONDS)
            while self._items and not self._given_up.is_set():
                self._write_first()

    def _write_first(self) -> None:
        """Write the item in front, or all the metrics in front together."""
        waiting = list(islice(self._items, METRICS_PER_BATCH))
        group = list(takewhile(lambda item: item.metrics, waiting)) or waiting[:1]
        if self._deliver(group):
            for _ in group:
                self._items.popleft()

    def _deliver(self, group: list[_Item]) -> bool:
        """Whether these need not be tried again: they are written, or refused for good and noted as lost."""
        pause = 0.5
        while not self._given_up.is_set():
            try:
                if group[0].send is not None:
                    group[0].send(self._client, self._run_id)
                for some in _batches([metric for item in group for metric in item.metrics], METRICS_PER_BATCH):
                    self._client.log_batch(self._run_id, metrics=some)
                self._trouble = None
                return True
            except Exception as error:  # whatever the client library raises, a run must not end for it
                self._trouble = error
                if isinstance(error, FileNotFoundError) or getattr(error, "error_code", None) in REFUSED:
                    if len(group) == 1:
                        self._lost.append(f"{group[0].what}: {_first_line(error)}")
                        return True
                    return all([self._deliver([item]) for item in group])  # one bad name takes no other step along
            if self._closing.wait(pause):
                self._given_up.wait(0.5)
            pause = min(2 * pause, LONGEST_PAUSE)
        return False


def _first_line(error: Exception | None) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def quiet_mlflow() -> Any:
    """The module, whose import takes more than a second and sets up logging of its own."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import mlflow

    for name in ("mlflow", "alembic", "urllib3.connectionpool"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return mlflow


@contextmanager
def _refusal_named(uri: str, experiment: str) -> Iterator[None]:
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError) as error:
        code = getattr(error, "error_code", None)
        remedy = "use another tracking.experiment" if code in REFUSED else "see whether it is well"
        if code == "RESOURCE_DOES_NOT_EXIST":
            remedy = "give the tracking.uri that the run was started with, start a new one under another run.name"
        raise ClusterError(
            f"tracking.uri={shown(uri)} refuses the run in tracking.experiment={experiment} ({_first_line(error)}); "
            f"{remedy}, or leave tracking.uri empty to use a file here"
        ) from error


def _batches(items: list, size: int) -> Iterator[list]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _tags(tags: Mapping[str, Any]) -> list[Any]:
    from mlflow.entities import RunTag

    return [RunTag(name, str(value)) for name, value in tags.items()]


def _system_metrics(run_id: str, uri: str, seconds: float, log: Callable[[int, dict[str, float]], None]) -> Any:
    """MLflow's own sampler, writing through `log`.

    As it comes, it ends at the first request that fails and records nothing of a run shorter than one interval.
    """
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    class Monitor(SystemMetricsMonitor):
        def monitor(self) -> None:
            ended = False
            while not ended:
                self.collect_metrics()
                ended = self._shutdown_event.wait(self.sampling_interval)
                self.publish_metrics(self.aggregate_metrics())

        def publish_metrics(self, metrics: dict[str, float]) -> None:
            log(self._logging_step, {self._metrics_prefix + name: value for name, value in metrics.items()})
            self._logging_step += 1
            for monitor in self.monitors:
                monitor.clear_metrics()

    return Monitor(run_id, sampling_interval=seconds, resume_logging=True, tracking_uri=uri)
