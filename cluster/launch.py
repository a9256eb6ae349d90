"""Starting workers: one Ray Train run, its reports brought to the driver.

``ray.train.report`` hands metrics to the controller, which is an actor. From there a queue carries them to the
driver, where alone the terminal and MLflow are spoken to.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from queue import Empty
from typing import Any

import ray
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchTrainer
from ray.util.queue import Queue

from cluster import placement_cleanup, without_datasets
from cluster.errors import ClusterError, Stopped
from cluster.interfaces import NodesTorchConfig
from cluster.nodes import on_this_node
from cluster.shared_storage import NotShared, on_shared_storage

# Ray Train's controller takes one report from each worker about every two seconds, and a worker that reports
# faster waits for it; what a worker has to say is therefore gathered and sent at this interval.
REPORT_INTERVAL_S = 2.5
# Ray Train's actor that looks out for machines about to be taken away: nothing asks for what it sees, and a node that
# goes is noticed without it.
_WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
# A worker group that finds no room within Ray Train's minute is tried this often before the run fails.
START_ATTEMPTS = 3
_ABORT_TIMEOUT_S = 30.0


class _Forward(UserCallback):
    """Runs in the controller: passes what the workers say on to the driver."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue
        self._is_known = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        placement_cleanup.mend()  # this object arrives in the controller's process before the run begins there
        without_datasets.mend()

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        if not self._is_known:
            self._is_known = True
            # Pickled, so that the queue's own process need not load what the controller is made of.
            actor = ray.cloudpickle.dumps(ray.get_runtime_context().current_actor)
            self._queue.put({"kind": "controller", "actor": actor})
        for report in metrics:
            if report:
                self._queue.put({"kind": "report", **report})

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        self._queue.put({"kind": "failure", "errors": {r: _last_line(e) for r, e in worker_exceptions.items()}})


def _last_line(error: BaseException) -> str:
    if isinstance(error, ray.exceptions.ActorUnavailableError):  # its own text is about connections of Ray's
        return "its process or its node does not answer"
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


class WorkersFailed(RuntimeError):
    """The workers failed more often than allowed; the message is the first worker's own last line.

    ``is_final``: they would fail again in the same way.
    """

    is_final = False


class RayLost(WorkersFailed):
    """The cluster itself went away under the run."""


def run_workers(
    worker: Callable[[dict[str, Any]], None],
    config: dict[str, Any],
    *,
    workers: int,
    resources_per_worker: dict[str, float],
    backend: str,
    attempt_dir: Path,
    max_failures: int,
    on_message: Callable[[dict[str, Any]], None],
    on_silence: Callable[[float], None] = lambda seconds: None,
) -> None:
    """Run ``worker(config)`` on every worker until all have returned.

    ``attempt_dir`` must be new: Ray Train would silently take up what lies in a folder used before. It lies on storage
    that all nodes share, which every worker checks.
    ``on_message`` gets, in a thread of this process, every non-empty report (``kind`` ``"report"``) and every failure
    of the group (``kind`` ``"failure"``, ``errors`` by rank); ``on_silence``, there too and about twice a second while
    nothing comes, the seconds since the last of them. Raises WorkersFailed, RayLost when the cluster has gone, and
    Stopped where one of these two raised it.
    """
    if attempt_dir.exists():
        raise ClusterError(f"attempt_dir={attempt_dir} exists already; give a folder of its own to every attempt")
    os.environ.setdefault(_WATCHER, "0")
    worker = on_shared_storage(worker, attempt_dir.parent)
    queue = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": on_this_node()})
    listener = _Listener(queue, on_message, on_silence)
    listener.start()
    trainer = TorchTrainer(
        worker,
        train_loop_config=config,
        torch_config=NodesTorchConfig(backend=backend),
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=resources_per_worker.get("GPU", 0) > 0,
            resources_per_worker=resources_per_worker,
        ),
        run_config=RunConfig(
            name=attempt_dir.name,
            storage_path=str(attempt_dir.parent),
            failure_config=FailureConfig(max_failures=max_failures, controller_failure_limit=START_ATTEMPTS - 1),
            callbacks=[_Forward(queue)],
        ),
    )
    try:
        _fit(trainer, listener)
    except ray.train.TrainingFailedError as error:
        failures = getattr(error, "worker_failures", None) or {}
        # One worker's full disk is the others' lost connection: what was named comes before what followed from it.
        named = [rank for rank in sorted(failures) if isinstance(failures[rank], ClusterError)]
        first = failures[named[0] if named else min(failures)] if failures else error
        failed = WorkersFailed(_last_line(first))
        failed.is_final = isinstance(first, NotShared)
        raise failed from error
    except ray.exceptions.RayError as error:  # the cluster went away under the run
        raise RayLost(f"Ray was lost: {_last_line(error)}") from error
    finally:
        listener.close()
        with contextlib.suppress(ray.exceptions.RayError):
            queue.shutdown(force=True)
    if listener.failure is not None:
        raise listener.failure


def _fit(trainer: TorchTrainer, listener: _Listener) -> None:
    """``trainer.fit()`` in a thread, so that Ctrl-C reaches this one.

    In the main thread Ray Train puts in a handler of its own, which answers Ctrl-C by leaving the process: no summary,
    no end of the run in MLflow. The owner of the session that the workers live in closes it, and them.
    """
    raised: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=fit, name="mmada-fit", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(timeout=0.2)
        if isinstance(listener.failure, Stopped):
            if listener.controller is not None:  # as Ray Train does at Ctrl-C: workers and their places are given back
                listener.controller.abort.remote()
                thread.join(timeout=_ABORT_TIMEOUT_S)
            raise listener.failure
    if raised:
        raise raised[0]


class _Listener(threading.Thread):
    """Hands messages on until the run is over and the queue is empty; what the receiver raised is kept."""

    def __init__(
        self, queue: Any, on_message: Callable[[dict[str, Any]], None], on_silence: Callable[[float], None]
    ) -> None:
        super().__init__(name="mmada-listener", daemon=True)
        self._queue, self._on_message, self._on_silence = queue, on_message, on_silence
        self._done = threading.Event()
        self.failure: Exception | None = None
        self.controller: Any = None  # the actor that leads the workers, once it has been heard of

    def close(self) -> None:
        """Hear what is still in the queue, for half a minute at most."""
        self._done.set()
        self.join(timeout=30)

    def run(self) -> None:
        heard = time.monotonic()
        while True:
            try:
                message = self._queue.get(timeout=0.5)
            except Empty:
                if self._done.is_set():
                    return
                self._call(self._on_silence, time.monotonic() - heard)
                continue
            except ray.exceptions.RayError:
                return  # Ray itself is going down, and the run with it
            if message.get("kind") == "controller":
                self.controller = ray.cloudpickle.loads(message["actor"])
            else:
                self._call(self._on_message, message)
            heard = time.monotonic()

    def _call(self, receiver: Callable[[Any], None], what: Any) -> None:
        try:
            receiver(what)
        except Exception as error:
            self.failure = self.failure or error
