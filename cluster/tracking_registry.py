"""Models in MLflow's registry, by name and version, each with what goes in and what comes out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
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
    before = mlflow.get_tracking_uri(), mlflow.get_registry_uri()
    mlflow.set_tracking_uri(uri)  # what logs a model knows no other way
    mlflow.set_registry_uri(uri)
    try:
        with refusal_named(uri, experiment):
            place = (
                experiment_id(client, uri, experiment) if run_id is None else client.get_run(run_id).info.experiment_id
            )
            mlflow.set_experiment(experiment_id=place)
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
    finally:
        mlflow.set_tracking_uri(before[0])
        mlflow.set_registry_uri(before[1])


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
