"""Whether a worker, wherever it runs, sees the driver's files: the first thing that it looks at."""

from __future__ import annotations

import socket
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray

from cluster.errors import ClusterError

# A network file system may keep for some seconds that a file was not there.
_PATIENCE_S = 10.0


class NotShared(ClusterError):
    """A folder that all nodes must see is not the driver's on one of them."""


def on_shared_storage(worker: Callable[[dict[str, Any]], None], folder: Path) -> Callable[[dict[str, Any]], None]:
    """``worker``, which first looks for a mark that is written into ``folder`` now, and raises NotShared without it.

    Without this a worker would make the folder on its own node's disk and fail much later, in the first checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mark, token = folder / ".driver", uuid.uuid4().hex
    mark.write_text(token)
    driver = socket.gethostname()

    def checked(config: dict[str, Any]) -> None:
        check_mark(mark, token, driver)
        worker(config)

    return checked


def check_mark(mark: Path, token: str, driver: str, patience_s: float = _PATIENCE_S) -> None:
    """Raise NotShared unless ``mark`` holds what the driver, on the node called ``driver``, wrote into it."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            if mark.read_text() == token:
                return
        except OSError:
            pass
        if time.monotonic() > deadline:
            break
        time.sleep(0.5)
    here = ray.util.get_node_ip_address()
    raise NotShared(
        f"run.dir: {mark.parent} on node {here} is not the folder that the driver on {driver} writes to; put run.dir "
        "on storage that all nodes see under the same path"
    )
