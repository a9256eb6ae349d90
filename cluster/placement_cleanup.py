"""Ray Train's guard of placement groups, mended: on a cluster that lives on it would stay for ever.

Ray Train 2.60 starts a detached actor that removes a run's placement group when the run's controller has died
(ray/train/v2/_internal/execution/controller/placement_group_cleaner.py). It asks for the controller through the
dashboard, whose address it has to guess and which a cluster may lack, and then calls ``ray.actor.exit_actor()`` in a
thread of its own, which ends that thread and not the actor: every run whose driver is stopped or killed would leave a
process on the head.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from typing import Any

import ray
from ray.train.v2._internal.callbacks import placement_group_callback
from ray.train.v2._internal.execution.controller.placement_group_cleaner import PlacementGroupCleaner


class EndingCleaner(PlacementGroupCleaner):
    """One that asks the cluster itself, and ends with its work."""

    def _monitor_loop(self) -> None:
        group: Any = None
        while not self._stop_event.is_set():
            with contextlib.suppress(queue.Empty):
                group = self._pg_queue.get(timeout=self._check_interval_s)
            if ray._private.state.actors(self._controller_actor_id).get("State", "DEAD") == "DEAD":
                while not self._pg_queue.empty():
                    group = self._pg_queue.get_nowait()
                self._cleanup_placement_group(group)
                break
        self._exit()

    def _exit(self) -> None:
        if threading.current_thread() is self._monitor_thread:
            os._exit(0)
        super()._exit()


def mend() -> None:
    """Have the controller in this process start the mended guard; to be called before the run begins."""
    placement_group_callback.PlacementGroupCleaner = EndingCleaner
