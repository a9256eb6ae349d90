"""Models in MLflow's registry, by name and version, each with what goes in and what comes out."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any

from cluster.tracking_client import client_of, experiment_id, quiet_mlflow, refusal_named
from cluster.tracking_uri import check_uri

Columns = Mapping[str, tuple[str, bool]]  # name -> (MLflow's type, whether it must be given)


@dataclass(frozen=True)
class Registration:
    """A model on its way into the registry.

    `folder` holds it; `loader_module`, a module inside the package at `code`, has a function `_load_pyfunc(folder)`
    whose result has `predict(table, params)`. The package travels with the model, `requirements` (names of installed
    distributions) are pinned at the versions that are installed. `example`: rows for `predict`, by column.
    `params`: their defaults. `tags` go to the version, such as where its checkpoint lies.
    """

    folder: Path
    loader_module: str
    code: Path
    inputs: Columns
    outputs: Columns
    example: Mapping[str, Sequence[Any]]
    params: Mapping[str, Any] = field(default_factory=dict)
    requirements: Sequence[str] = ()
    tags: Mapping[str, Any] = field(default_factory=dict)
    step: int = 0


def register(uri: str, name: str, model: Registration, experiment: str, run_id: str | None) -> str:
    """Upload a model and make it the next version of `name`; the version.

    Args:
        uri: the server or file, whose registry is used.
        name: created when missing.
        model: what is registered.
        experiment: where the model is listed, when it belongs to no run.
        run_id: the run that it came from, or None.

    Raises:
        ClusterError: `uri` does not answer, or refuses the model.
    """
    check_uri(uri)
    mlflow = quiet_mlflow()
    client = client_of(uri)
    with refusal_named(uri, experiment):
        run = None if run_id is None else client.get_run(run_id)
        place = run.info.experiment_id if run else experiment_id(client, uri, experiment)
        with _addressed(mlflow, uri, place):
            info = mlflow.models.Model.log(
                artifact_path=None,
                name=name,
                flavor=mlflow.pyfunc,
                run_id=run_id,
                registered_model_name=name,
                loader_module=model.loader_module,
                data_path=str(model.folder),
                code_paths=[str(model.code)],
                signature=_signature(model),
                input_example=_example(model),
                pip_requirements=[f"{each}=={version(each).partition('+')[0]}" for each in model.requirements],
                metadata=dict(model.tags),
                tags=dict(model.tags),
                step=model.step,
            )
        number = str(info.registered_model_version)
        for tag, value in model.tags.items():
            client.set_model_version_tag(name, number, tag, str(value))
        return number


@contextmanager
def _addressed(mlflow: Any, uri: str, experiment: str) -> Iterator[None]:
    """What logs a model takes its address from the process; afterwards the process is as it was.

    It counts weights on stderr while it loads them to try the example, and says there what the caller says better.
    """
    names = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME")
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    os.environ["MLFLOW_EXPERIMENT_ID"] = experiment
    try:
        with redirect_stderr(StringIO()):
            yield
    finally:
        mlflow.set_tracking_uri(None)
        mlflow.set_registry_uri(None)
        for name in names:
            os.environ.pop(name, None)
        os.environ.update(kept)


def _signature(model: Registration) -> Any:
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    def schema(columns: Columns) -> Any:
        return Schema([ColSpec(kind, name, required) for name, (kind, required) in columns.items()])

    types = {int: "long", float: "double", str: "string", bool: "boolean"}
    params = [ParamSpec(name, types[type(value)], value) for name, value in model.params.items()]
    return ModelSignature(schema(model.inputs), schema(model.outputs), ParamSchema(params) if params else None)


def _example(model: Registration) -> Any:
    import pandas

    table = pandas.DataFrame(dict(model.example))
    return (table, dict(model.params)) if model.params else table
