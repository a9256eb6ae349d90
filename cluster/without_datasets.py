"""Ray Train without its actor for Ray Data: workers here read their rows themselves.

Ray Train 2.60 starts one for every group of workers, with data sets or without
(ray/train/v2/_internal/callbacks/datasets.py): a process of 200 MB and two CPU seconds beside each run and each trial
of a search.
"""

from __future__ import annotations

from typing import Any

from ray.train.v2._internal.callbacks import datasets


class NoDatasets:
    """In place of what asks that actor for a worker's part of a data set."""

    def __init__(self, **arguments: Any) -> None:
        """Nothing is started."""

    def get_dataset_shard(self, dataset_info: Any) -> Any:
        """There is none."""
        raise KeyError(f"no data set named {dataset_info.dataset_name} was given to the trainer")

    def shutdown_data_executors(self) -> None:
        """There are none."""


def mend() -> None:
    """Have the controller in this process start none; to be called before the run begins."""
    datasets.RayDatasetShardProvider = NoDatasets
