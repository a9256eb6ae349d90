"""By which network interface workers on several nodes find each other."""

from __future__ import annotations

import os
from typing import Any

import psutil
import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

_GLOO = "GLOO_SOCKET_IFNAME"


class _NodesBackend(_TorchBackend):
    """Before torch.distributed starts, tells gloo which interface the cluster uses where there are several nodes.

    Gloo takes the address that the node's own name stands for. In /etc/hosts that is often 127.0.0.1 or 127.0.1.1,
    which no other node can reach, while the address that the node has joined the cluster by is reached by all.
    """

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        if len(set(worker_group.execute(ray.util.get_node_ip_address))) > 1:
            worker_group.execute(name_interface)
        super().on_start(worker_group, backend_config)


class NodesTorchConfig(TorchConfig):
    """Ray Train's own, for workers on one node or on several."""

    @property
    def backend_cls(self) -> type[_NodesBackend]:
        """What prepares the workers."""
        return _NodesBackend


def name_interface() -> None:
    """In a worker: the interface of this node's address in the cluster, unless the user has named one."""
    own = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == own for address in addresses):
            os.environ.setdefault(_GLOO, name)
