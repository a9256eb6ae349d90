"""The packages that a job needs and its cluster lacks."""

from __future__ import annotations

import tomllib
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from cluster.errors import ClusterError
from jobs.submission.package import ROOT


def requirements(with_tasks: bool, root: Path = ROOT) -> dict[str, Requirement]:
    """What mmada asks for by name; ``with_tasks``: and what the problems of reinforcement learning come from."""
    file = root / "pyproject.toml"
    if file.is_file():
        project = tomllib.loads(file.read_text())["project"]
        lines = project["dependencies"] + (project["optional-dependencies"]["rl"] if with_tasks else [])
        found = [Requirement(line) for line in lines]
    else:  # installed, without a checkout
        extra = {"extra": "rl" if with_tasks else ""}
        stated = [Requirement(line) for line in requires("mmada") or ()]
        found = [each for each in stated if each.marker is None or each.marker.evaluate(extra)]
    return {canonicalize_name(each.name): each for each in found}


def pins(names: list[str], root: Path = ROOT) -> dict[str, str]:
    """The version of each package that this checkout is tested with, or that is installed here; some have none."""
    file = root / "constraints.txt"
    found: dict[str, str] = {}
    for line in file.read_text().splitlines() if file.is_file() else ():
        name, equals, pinned = line.partition("==")
        if equals:
            found[canonicalize_name(name)] = pinned.strip()
    for name in set(names) - found.keys():
        try:
            found[name] = Version(version(name)).public
        except PackageNotFoundError:
            continue
    return {name: found[name] for name in names if name in found}


def needed_pins(there: dict[str, str | None], wanted: dict[str, Requirement], address: str) -> list[str]:
    """What Ray is to install for the job, as ``name==version``: what is not ``there`` in just the version pinned here.

    Builds of one version (``2.13.0+cu130``) count as that version. Raises ClusterError for a Ray that is too old: it
    is the one thing that a job cannot bring.
    """
    has_ray = there.get("ray")
    if has_ray is None or not wanted["ray"].specifier.contains(has_ray):
        raise ClusterError(
            f"address={address} runs ray {has_ray}, and mmada needs {wanted['ray'].specifier}; start the cluster with "
            "such a Ray (the image of infra/ has it)"
        )
    pinned = pins([name for name in wanted if name != "ray"])
    return [
        f"{name}=={number}"
        for name, number in sorted(pinned.items())
        if (has := there.get(name)) is None or Version(has).public != number
    ]
