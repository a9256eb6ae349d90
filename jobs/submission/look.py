"""A look at a cluster from inside, by a job of some seconds: its Python, its packages, and where runs would lie."""

from __future__ import annotations

import json
import shlex
import uuid
from collections.abc import Iterable
from dataclasses import dataclass

from cluster.errors import ClusterError
from cluster.ray_jobs import RayJobs

# The folder that relative paths of a submitted recipe are taken from, where the cluster's own environment names one.
STORAGE_VARIABLE, STORAGE_DEFAULT = "MMADA_STORAGE", "~/mmada"
TIMEOUT_SECONDS = 180.0
# What such jobs are called. They stay on Ray's list: one that is deleted as soon as it has ended comes back as failed.
LOOK = "mmada-look-"

# The interpreter that Ray runs with, found by the library that Ray's own process has loaded: a cluster that was started
# as .venv/bin/ray has another python on its PATH, or none.
PYTHON = (
    r'p=$(sed -n "s|.* \(/.*\)/lib/python[0-9.]*/[a-z]*-packages/ray/_raylet.so\$|\1|p" /proc/$PPID/maps | head -n 1); '
    'p="${p:+$p/bin/python}"; exec "${p:-python3}"'
)
QUESTION = """
import importlib.metadata, json, os, pathlib, sys
asked = json.loads(sys.argv[1])
versions = {}
for name in asked["names"]:
    try:
        versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        versions[name] = None
named = asked["folder"] or os.environ.get(asked["variable"])
path, refusal = os.path.abspath(os.path.expanduser(named or asked["default"])), ""
try:
    os.makedirs(path, exist_ok=True)
    probe = pathlib.Path(path, f".mmada-{os.getpid()}")
    probe.touch()
    probe.unlink()
except OSError as error:
    refusal = error.strerror or str(error)
print(json.dumps({"python": sys.executable, "version": list(sys.version_info[:2]), "versions": versions,
                  "folder": path, "at_home": not named, "refusal": refusal}))
"""


@dataclass(frozen=True)
class Inside:
    """What a cluster looks like from its head. ``versions``: of the packages asked for, None for a missing one.

    ``is_at_home``: nobody has named ``folder``, and it is in the home of the head's user.
    """

    python: str
    folder: str
    versions: dict[str, str | None]
    is_at_home: bool = False


def look_inside(jobs: RayJobs, names: Iterable[str], folder: str | None) -> Inside:
    """Ask the cluster's head; ``folder`` is what relative paths are to be taken from, None leaves it to the cluster.

    Raises ClusterError for a Python that is too old and a folder that cannot be written to.
    """
    asked = {"names": list(names), "folder": folder, "variable": STORAGE_VARIABLE, "default": STORAGE_DEFAULT}
    job_id = f"{LOOK}{uuid.uuid4().hex[:8]}"
    jobs.submit(job_id, f"{PYTHON} -c {shlex.quote(QUESTION)} {shlex.quote(json.dumps(asked))}")
    job = jobs.wait(job_id, TIMEOUT_SECONDS)
    if job.status != "SUCCEEDED":
        reason = (job.message.strip().splitlines() or [job.status])[-1]
        jobs.stop(job_id)
        raise ClusterError(f"address={jobs.address} runs no job ({reason[:300]}); see 'ray status' and its logs there")
    said = json.loads(jobs.logs(job_id).strip().splitlines()[-1])
    if said["version"] < [3, 11]:
        raise ClusterError(
            f"address={jobs.address} runs Python {'.'.join(map(str, said['version']))}, and mmada needs 3.11 or newer; "
            "start the cluster with it (the image of infra/ has it)"
        )
    if said["refusal"]:
        raise ClusterError(
            f"--folder={said['folder']} cannot be written to on the cluster ({said['refusal']}); name a folder on its "
            f"storage, or set {STORAGE_VARIABLE} there"
        )
    return Inside(said["python"], said["folder"], said["versions"], said["at_home"])
