"""The runs of a sweep in MLflow: sweep, trials, attempts, one below the other."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from typing import Any

from cluster.tracking import IDENTITY, quiet_mlflow


def end_runs_below(uri: str, experiment: str, identity: str, done: Collection[int] = ()) -> int:
    """End what still counts as running below the run of that identity, ``identity/trial/attempt``; how many runs.

    For whoever knows that their processes have ended without saying so. Runs of the trials ``done`` are finished, all
    others killed. A server that does not answer is left alone: the next start of the same runs puts them right.
    """
    mlflow = quiet_mlflow()
    from mlflow.exceptions import MlflowException

    ended = 0
    with contextlib.suppress(MlflowException, OSError):
        client: Any = mlflow.MlflowClient(tracking_uri=uri)
        found = client.get_experiment_by_name(experiment)
        if found is None:
            return 0
        running = f"attributes.status = 'RUNNING' AND tags.`{IDENTITY}` LIKE '{identity}/%'"
        for run in client.search_runs([found.experiment_id], running, max_results=1000):
            trial = int(run.data.tags[IDENTITY].removeprefix(f"{identity}/").partition("/")[0])
            client.set_terminated(run.info.run_id, "FINISHED" if trial in done else "KILLED")
            ended += 1
    return ended
