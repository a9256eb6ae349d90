"""Room for a run: counted, and waited for on a real cluster whose machines a real autoscaler starts and ends."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import uuid
from pathlib import Path

import psutil
import pytest

from cluster.errors import ClusterError
from cluster.places import Demand, places

REPOSITORY = Path(__file__).parents[2]
WAIT_S = 100
HEAD_ID = "f" * 51 + "00000"  # as Ray's provider of machines on this machine calls its head


def node(cpu, gpu=0.0, alive=True):
    return {"Alive": alive, "Resources": {"CPU": cpu, "GPU": gpu}}


def test_places_are_counted_node_by_node():
    # Eight CPUs, yet no node has room for a worker of two.
    assert places([node(1)] * 8, 2, 0) == 0
    assert places([node(8, 2), node(4, 4)], 2, 1) == 2 + 2
    assert places([node(8), node(8, alive=False)], 1, 0) == 8
    assert places([node(0.3)], 0.1, 0) == 3
    assert places([node(4, 1)], 1, 0.25) == 4
    assert places([{"Alive": True, "Resources": {}}], 1, 0) == 0


def test_every_process_is_asked_for_by_itself():
    demand = Demand(2, 4, 1, extra_cpus=6, extra_gpus=0, extra_actors=3)
    assert demand.bundles() == [{"CPU": 4, "GPU": 1}] * 2 + [{"CPU": 2}] * 3
    assert Demand(1, 1, 0).bundles() == [{"CPU": 1}]
    assert demand.fits([node(14, 2)]) and not demand.fits([node(13, 2)])
    with pytest.raises(ClusterError, match="there is room for 0 .0 CPU and 0 GPU on 1 node.; add nodes"):
        demand.require([node(0)])


@pytest.fixture(scope="module")
def growing_cluster(tmp_path_factory):
    """A head without CPUs, guarded by a token, whose autoscaler starts machines of 2 CPU, 2 at most: its address."""
    folder = tmp_path_factory.mktemp("growing")
    temp_dir = tempfile.mkdtemp(prefix="ray")  # a Unix socket's path has to be short
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    mark, token = uuid.uuid4().hex, uuid.uuid4().hex * 2
    config = {
        "cluster_name": "growing",
        "max_workers": 2,
        "idle_timeout_minutes": 10,
        "provider": {
            "type": "fake_multinode",
            "gcs_address": f"127.0.0.1:{port}",
            "head_node_id": HEAD_ID,
            "launch_multiple": True,
            "disable_node_updaters": True,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {}, "node_config": {}, "max_workers": 0},
            "machine": {"resources": {"CPU": 2}, "node_config": {}, "min_workers": 0, "max_workers": 2},
        },
        "head_node_type": "ray.head.default",
        **{name: {} for name in ("auth", "docker", "file_mounts")},
        **{name: [] for name in ("cluster_synced_files", "rsync_exclude", "rsync_filter", "initialization_commands")},
        **{name: [] for name in ("setup_commands", "head_setup_commands", "worker_setup_commands")},
        **{name: [] for name in ("head_start_ray_commands", "worker_start_ray_commands")},
    }
    config_file = folder / "autoscaling.json"
    config_file.write_text(json.dumps(config))
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = inherited | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "PLACES_TEST_MARK": mark,
    }
    command = ["start", "--head", "--block", f"--port={port}", f"--temp-dir={temp_dir}", "--num-cpus=0"]
    head = subprocess.Popen(
        [
            Path(sys.executable).parent / "ray",
            *command,
            f"--autoscaling-config={config_file}",
            "--include-dashboard=false",
        ],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    watchdog = threading.Timer(2 * WAIT_S, head.kill)
    watchdog.start()
    try:
        assert any("Ray runtime started" in line for line in head.stdout)
        yield f"127.0.0.1:{port}", token
    finally:
        watchdog.cancel()
        ours = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if process.environ().get("PLACES_TEST_MARK") == mark:
                    ours.append(process)
        for process in ours:  # machines that the autoscaler has started outlive it
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        psutil.wait_procs(ours, timeout=30)
        head.wait(timeout=30)
        head.stdout.close()
        shutil.rmtree(temp_dir, ignore_errors=True)


def test_a_run_brings_its_machines_or_says_that_none_came(tmp_path, growing_cluster):
    address, token = growing_cluster
    script = f"""
import json, time
import ray
from cluster.errors import ClusterError
from cluster.session import RaySession

address, folder, patience, words = {address!r}, {str(tmp_path)!r}, {WAIT_S}, []
with RaySession(
    address, 1, 2, 0, folder, patience, extra_cpus=2, extra_actors=2, queue_timeout_s=patience, on_wait=words.append
):
    machines = sum(node["Alive"] and node["Resources"].get("CPU", 0) == 2 for node in ray.nodes())
    groups = [each["state"] for each in ray.util.placement_group_table().values()]
try:
    with RaySession(address, 1, 3, 0, folder, patience, queue_timeout_s=2):  # more than a machine has
        refusal = None
except ClusterError as error:
    refusal = str(error)
print(json.dumps([machines, groups, words, refusal]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=REPOSITORY,
        env=os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token},
        capture_output=True,
        text=True,
        timeout=2.5 * WAIT_S,
    )
    assert done.returncode == 0, done.stderr
    machines, groups, words, refusal = json.loads(done.stdout)
    assert machines == 2
    assert groups == ["REMOVED"]  # nothing of the asking stands in the workers' way
    wanted = "waiting for room for 1 worker of 2 CPU and 2 CPU beside them: so far there are "
    assert words[0] == f"{wanted}0 CPU and 0 GPU on 1 node …"
    assert refusal.startswith(
        "cluster.queue_timeout=2 s have passed without room for 1 worker of 3 CPU: there are 4 CPU and 0 GPU on 3 "
        "nodes, some of it perhaps in use ('ray status' on the head says so"
    )
