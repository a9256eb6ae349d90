"""Ray Train's guard of placement groups, mended: on a cluster that lives on it would stay for ever.

Ray Train 2.60 starts a detached actor that removes a run's placement group when the run's controller has died. It then
calls ``ray.actor.exit_actor()`` in a thread of its own, which ends that thread and not the actor
(ray/train/v2/_internal/execution/controller/placement_group_cleaner.py, ``_monitor_loop``): every run whose driver is
stopped or killed leaves a process on the head.
"""

from __future__ import annotations

import os
import threading

from ray.train.v2._internal.callbacks import placement_group_callback
from ray.train.v2._internal.execution.controller.placement_group_cleaner import PlacementGroupCleaner


class EndingCleaner(PlacementGroupCleaner):
    """One that ends with its work."""

    def _exit(self) -> None:
        if threading.current_thread() is self._monitor_thread:
            os._exit(0)
        super()._exit()


def mend() -> None:
    """Have the controller in this process start the mended guard; to be called before the run begins."""
    placement_group_callback.PlacementGroupCleaner = EndingCleaner
