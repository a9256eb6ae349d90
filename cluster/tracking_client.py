"""MLflow's client: loaded quietly, its refusals named, a run opened in it."""

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from cluster.errors import ClusterError
from cluster.tracking_uri import shown, sqlite_path

PARAMS_PER_BATCH, PARAM_LENGTH = 100, 6000  # MLflow's own limits
NO_SUCH_RUN = "RESOURCE_DOES_NOT_EXIST"
# What MLflow will never take. A run that it does not know may be one of a database that is not back yet.
REFUSED = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST"}
REFUSED_AT_START = {*REFUSED, NO_SUCH_RUN, "PERMISSION_DENIED", "NOT_FOUND"}

# Where the user has not said otherwise. MLflow itself tries a request for minutes; here the writers try again.
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
}


def quiet_mlflow() -> Any:
    """The module, whose import takes more than a second and sets up logging of its own."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import mlflow

    for name in ("mlflow", "alembic", "urllib3.connectionpool"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return mlflow


def client_of(uri: str) -> Any:
    """An `MlflowClient` for runs and registered models; speaks to nobody yet."""
    return quiet_mlflow().MlflowClient(tracking_uri=uri, registry_uri=uri)


@contextmanager
def refusal_named(uri: str, experiment: str) -> Iterator[None]:
    """Turn what MLflow raises into a ClusterError of one line; its `__cause__` is what was raised."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError) as error:
        code = getattr(error, "error_code", None)
        remedy = "use another tracking.experiment" if code in REFUSED_AT_START else "see whether it is well"
        if code == NO_SUCH_RUN:
            remedy = "give the tracking.uri that the run was started with, start a new one under another run.name"
        raise ClusterError(
            f"tracking.uri={shown(uri)} refuses the run in tracking.experiment={experiment} ({first_line(error)}); "
            f"{remedy}, or leave tracking.uri empty to use a file here"
        ) from error


def first_line(error: Exception | None) -> str:
    """What an error says at first, at most 300 characters."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def reason(error: Exception | None) -> str:
    """Why something did not arrive, in few words."""
    text = first_line(error)
    return "the server does not answer" if "failed with exception" in text else text  # MLflow's words for no answer


def experiment_id(client: Any, uri: str, experiment: str) -> str:
    """The id of an experiment, which is created when missing."""
    from mlflow.exceptions import MlflowException

    beside = sqlite_path(uri).parent / "mlartifacts"
    location = beside.as_uri() if uri.startswith("sqlite:") else None  # a server knows its own place
    found = client.get_experiment_by_name(experiment)
    if found is None:
        try:
            return client.create_experiment(experiment, artifact_location=location)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(experiment)  # another run was faster
    return found.experiment_id


def open_run(client: Any, run_id: str, params: Mapping[str, str], tags: Mapping[str, Any]) -> None:
    """Set a run to running, with its parameters and tags.

    MLflow never changes a parameter: one that differs is recorded as the tag `resumed.<name>`.
    """
    from mlflow.entities import Param

    run = client.get_run(run_id)
    if run.info.status != "RUNNING":
        client.update_run(run_id, status="RUNNING")
    recorded = run.data.params
    new = [Param(name, value) for name, value in params.items() if name not in recorded]
    changed = {f"resumed.{name}": value for name, value in params.items() if recorded.get(name, value) != value}
    for some in batches(new, PARAMS_PER_BATCH):
        client.log_batch(run_id, params=some)
    set_tags(client, run_id, {**tags, **changed})


def set_tags(client: Any, run_id: str, tags: Mapping[str, Any]) -> None:
    """Set tags, each as the text of its value."""
    from mlflow.entities import RunTag

    for some in batches([RunTag(name, str(value)) for name, value in tags.items()], PARAMS_PER_BATCH):
        client.log_batch(run_id, tags=some)


def batches(items: Sequence, size: int) -> Iterator[Sequence]:
    """Slices of at most that many."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


UNNAMEABLE = re.compile(r"[^\w.\-/: ]")  # MLflow's names of parameters and metrics


def flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """{"train": {"steps": 20}} as {"train.steps": "20"}; lists as JSON.

    Values are cut at MLflow's 6000 characters; in names, what MLflow does not take becomes "_".
    """
    flat: dict[str, str] = {}
    for name, value in params.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            text = json.dumps(value, default=str) if isinstance(value, (list, tuple, Mapping)) else str(value)
            flat[UNNAMEABLE.sub("_", f"{prefix}{name}")] = text[:PARAM_LENGTH]
    return flat
