"""Recording runs in MLflow, from the driver alone, without ever holding up training."""

import shlex
import shutil
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from cluster.checkpoints import MANIFEST
from cluster.errors import ClusterError
from cluster.tracking_buffer import BUFFER, STATE, Buffer, read_json
from cluster.tracking_client import (
    REFUSED_AT_START,
    client_of,
    experiment_id,
    flatten,
    open_run,
    quiet_mlflow,
    reason,
    refusal_named,
)
from cluster.tracking_entries import in_words, words
from cluster.tracking_system import PREFIX, system_metrics
from cluster.tracking_uri import check_uri, shown, sqlite_path
from cluster.tracking_writer import Writers

__all__ = ["BUFFER", "Tracker", "check_uri", "flatten", "quiet_mlflow"]

IDENTITY = "mmada.identity"  # the tag of a run that can be found again without its id
STATUS = {"done": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}


class Tracker:
    """One MLflow run.

    Whatever is recorded goes into a buffer in the run's folder, from which threads bring it to MLflow: a slow or dead
    server costs the caller nothing. What it has not taken when the run ends stays there; `finish` says so, and
    `mmada send` or the run itself, continued, sends it.

    A new run needs its server: the constructor and `start` raise where it does not answer. A run that has been
    recorded there before goes on without it.

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
        buffer: folder for what MLflow does not have yet; None for one in `run_dir`.

    Raises:
        ClusterError: `uri` is malformed, or does not answer within ten seconds and has not recorded this run before.
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
        buffer: Path | None = None,
    ):
        self.run_dir = Path(run_dir).absolute()
        self.uri = uri or f"sqlite:///{self.run_dir.parent / 'mlflow.db'}"
        self.experiment = experiment
        self.run_name = run_name
        self.run_id = run_id
        self.system_metrics_seconds = system_metrics_seconds
        self.waits_because = ""  # why the server is not there, where the run goes on without
        parent = {} if parent_run_id is None else {"mlflow.parentRunId": parent_run_id}
        self.identity = identity
        known_as = {} if identity is None else {IDENTITY: identity}
        self._own_tags = {"run.dir": self.run_dir, **(tags or {}), **parent, **known_as}
        self._buffer = Buffer(buffer or self.run_dir / BUFFER)
        self._writers: Writers | None = None
        self._monitor: Any = None
        self._client: Any = None
        known = read_json(self._buffer.folder / STATE)
        if run_id is None and identity is not None and known.get("identity") == identity:
            run_id = self.run_id = known.get("run_id")  # what waits here is this very run's
        self._is_known = run_id is not None and (known.get("uri"), known.get("run_id")) == (self._place(), run_id)
        try:
            check_uri(self.uri)
        except ClusterError as error:
            if not (self._is_known and self.uri.startswith("http")):
                raise
            self.waits_because = str(error).partition(";")[0]

    def start(self, params: Mapping[str, Any]) -> str:
        """Create the run, or reopen it; returns its id.

        Args:
            params: the resolved recipe; nested mappings become names with dots. MLflow never changes a parameter:
                in a continued run a value that differs is recorded as the tag `resumed.<name>`.

        Raises:
            ClusterError: the server refuses, or has no run of this id; another process records this run.
        """
        self._client = client_of(self.uri)
        self._open_buffer()
        try:
            self._open_run(flatten(params))
            if self.system_metrics_seconds:
                self._monitor = system_metrics(
                    str(self.run_id),
                    self.uri,
                    self.system_metrics_seconds,
                    self.log,
                    self._buffer.handed.next_step(PREFIX),
                    ask_server=not self.waits_because,
                )
        except BaseException:
            self._buffer.close()
            if not {"run_id", "creating"} & set(self._buffer.state):
                shutil.rmtree(self._buffer.folder)
            raise
        self._scratch = tempfile.TemporaryDirectory(prefix="mmada-figures-")
        self._writers = Writers(self._buffer, self._client, str(self.run_id))
        if self._monitor is not None:
            self._monitor.start()
        return str(self.run_id)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record metrics of a step. Returns at once."""
        values = {name: float(value) for name, value in metrics.items()}
        self._put({"kind": "metrics", "step": int(step), "time": _now(), "values": values})

    def steps_of(self, metric: str) -> set[int]:
        """Steps at which the started run has recorded a metric, those that still wait to be sent among them."""
        if self._writers is None or self.run_id is None:
            raise ValueError(f"steps_of({metric}) was asked of a tracker that is not started")
        handed = self._buffer.handed.steps(metric)
        if self.waits_because:
            return handed
        waiting = {e["step"] for e in self._buffer.left() if e["kind"] == "metrics" and metric in e["values"]}
        try:
            with refusal_named(self.uri, self.experiment):
                return waiting | {point.step for point in self._client.get_metric_history(self.run_id, metric)}
        except ClusterError:
            if not self._buffer.state.get("whole"):
                raise
            return handed

    def figure(self, name: str, figure: Any) -> None:
        """Record a Matplotlib figure as the artifact `figures/<name>.png`. It is drawn now and sent later."""
        self._refuse_unless_started(f"figure {name}")
        drawn = Path(tempfile.mkdtemp(dir=self._scratch.name)) / f"{name}.png"
        figure.savefig(drawn, format="png", bbox_inches="tight")
        path = self._kept(drawn, f"figures/{name}.png")
        self._put({"kind": "file", "path": path, "folder": "figures", "words": f"figure {name}"})

    def checkpoint(self, path: Path, step: int, bytes: int) -> None:
        """Record a checkpoint by reference: where it lies, its size in bytes and its checksums.

        Every one gets the artifact `checkpoints/step-<step>.json`, with size and SHA-256 of each file as its manifest
        has them. Tags say where the newest lies: `checkpoint.path`, `.step`, `.bytes`, and `.sha256` of the manifest,
        which covers all the others.
        """
        manifest = read_json(Path(path) / MANIFEST)
        content = {"path": str(path), "step": int(step), "bytes": int(bytes)}
        if manifest:
            content["sha256"] = manifest["manifest_sha256"]
        self.tag({f"checkpoint.{name}": value for name, value in content.items()})
        content["files"] = manifest.get("files", {})
        self._put({"kind": "reference", "step": int(step), "content": content})

    def tag(self, tags: Mapping[str, Any]) -> None:
        """Set tags of the run, for what was not known when its parameters were given."""
        self._put({"kind": "tags", "tags": {name: str(value) for name, value in tags.items()}})

    def changed(self, step: int, params: Mapping[str, Any]) -> None:
        """Record parameters that have other values from a step on, which MLflow's parameters cannot say.

        The tag `changed.<name>` has the newest value; a number is the metric `changed.<name>` at that step, too.
        """
        flat = {f"changed.{name}": value for name, value in params.items()}
        self.tag(flat)
        numbers = {k: v for k, v in flat.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
        if numbers:
            self.log(step, numbers)

    def table(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Add rows, which have the same keys each time, to the table `tables/<name>.json`."""
        self._refuse_unless_started(f"table {name}")
        columns = {key: [row[key] for row in rows] for key in rows[0]} if rows else {}
        file = f"tables/{name}.json"
        self._put({"kind": "table", "file": file, "columns": columns, "before": self._buffer.handed.rows(file)})

    def artifact(self, path: Path) -> None:
        """Record a file or a folder: as it is when its turn comes inside the run's folder, as it is now elsewhere."""
        path = Path(path).absolute()
        self._refuse_unless_started(f"artifact {path}")
        is_elsewhere = path.exists() and not path.is_relative_to(self.run_dir)
        kept = self._kept(path, f"artifacts/{path.name}") if is_elsewhere else str(path)
        self._put({"kind": "file", "path": kept, "folder": None, "words": f"artifact {path}"})

    def finish(self, status: str, timeout_s: float = 30.0) -> list[str]:
        """Write what is left and close the run.

        Args:
            status: "done", "failed" or "stopped" (by whoever compares runs, with nothing wrong).
            timeout_s: seconds to wait for the server; what is left then stays in the buffer.

        Returns:
            One line for each thing that MLflow refused for good, and one that says what is left, why, and how to send
            it; empty when all was written, or `start` never came to its end.
        """
        end = STATUS[status]
        if self._writers is None:
            return []
        if self._monitor is not None:
            self._monitor.finish()
        self._put({"kind": "end", "opened": self._buffer.state["opened"], "status": end, "time": _now()})
        writers, self._writers = self._writers, None
        writers.close(timeout_s)
        said = writers.refused
        try:
            left = in_words(self._buffer.left())
        except OSError as error:
            left = f"what {self._buffer.folder} holds, which cannot be read ({error.strerror})"
        lost = self._buffer.close()
        self._scratch.cleanup()
        if lost:
            said.append(f"{lost} things for MLflow were lost: {self._buffer.folder} cannot be written")
        elif left:
            because = f" ({reason(writers.trouble)})" if writers.trouble else ""
            said.append(
                f"not in MLflow within {timeout_s:g} s{because}: {left}; send them later with "
                f"mmada send {shlex.quote(_shown_path(self._buffer.folder.parent))}"
            )
        return said

    def forget(self) -> None:
        """Delete the buffer of a finished run that is never continued, and the folder that it is alone in."""
        shutil.rmtree(self._buffer.folder)
        with suppress(OSError):  # it holds other things
            self._buffer.folder.parent.rmdir()

    def _open_buffer(self) -> None:
        """Open the buffer; one of another MLflow run is put aside."""
        folder = self._buffer.folder
        known = read_json(folder / STATE).get("run_id")
        if known is not None and known != self.run_id:
            folder.rename(folder.with_name(f"{folder.name}-{known}"))
        self._buffer.open()
        self._buffer.remember(opened=self._buffer.state.get("opened", 0) + 1)

    def _open_run(self, params: dict[str, str]) -> None:
        """Have MLflow know the run, its parameters and its tags, now or when the server is back."""
        buffer, state = self._buffer, self._buffer.state
        tags = {name: str(value) for name, value in self._own_tags.items()}
        if not self.waits_because:
            try:
                with refusal_named(self.uri, self.experiment):
                    if self.run_id is None:
                        self.run_id = self._create_run(tags)
                    names = {"uri": self._place(), "experiment": self.experiment, "run_id": self.run_id}
                    buffer.remember(**names, identity=self.identity)
                    if buffer.is_empty():
                        open_run(self._client, self.run_id, params, tags)
                        return
                    self._client.get_run(self.run_id)  # is it known? What waits goes first.
            except ClusterError as refused:
                error = cast(Exception, refused.__cause__)
                if not self._is_known or getattr(error, "error_code", None) in REFUSED_AT_START:
                    raise
                self.waits_because = f"tracking.uri={shown(self.uri)} does not take the run ({reason(error)})"
        buffer.append({"kind": "open", "opened": state["opened"], "params": params, "tags": tags})

    def _create_run(self, tags: dict[str, str]) -> str:
        """A new run; the one that a process killed meanwhile had made, if there is one."""
        experiment = experiment_id(self._client, self.uri, self.experiment)
        if self.identity is not None:
            for run in self._client.search_runs([experiment], f"tags.`{IDENTITY}` = '{self.identity}'", max_results=1):
                return run.info.run_id
        if (began := self._buffer.state.get("creating")) is not None:
            found = self._client.search_runs([experiment], f"attributes.start_time = {began}")
            for run in found:
                if run.data.tags.get("run.dir") == str(self.run_dir):
                    return run.info.run_id
        self._buffer.remember(creating=_now(), whole=True)
        run = self._client.create_run(experiment, self._buffer.state["creating"], tags, self.run_name)
        return run.info.run_id

    def _place(self) -> str:
        """The address as one can find it from any working directory."""
        is_file = self.uri.startswith("sqlite:///") and "?" not in self.uri
        return f"sqlite:///{sqlite_path(self.uri)}" if is_file else self.uri

    def _kept(self, path: Path, name: str) -> str:
        """The place of a file's copy in the buffer; its own, where the disk does not take one."""
        try:
            return self._buffer.keep_file(path, name)
        except OSError:
            return str(path)

    def _put(self, entry: dict[str, Any]) -> None:
        self._refuse_unless_started(words(entry))
        self._buffer.append(entry)

    def _refuse_unless_started(self, what: str) -> None:
        if self._writers is None:
            raise ValueError(f"{what} was given to a tracker that is not started")


def _now() -> int:
    return int(time.time() * 1000)


def _shown_path(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
