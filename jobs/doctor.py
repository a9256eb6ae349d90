"""``mmada doctor``: what this machine has for mmada, what is missing and how to get it.

Each check is a function that returns a ``Finding``; ``run`` shows them and says by its exit code whether all that is
needed is there. Versions are read from the packages' metadata, so that a broken library is named and not imported.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import psutil
from packaging.requirements import Requirement
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

INSTALL = "run `make install` in the repository, or `pip install -c constraints.txt -e .` there"
GIB = 2**30
LEAST_MEMORY = 6 * GIB


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. A missing thing that is ``needed`` makes the machine unfit."""

    what: str
    found: str
    good: bool = True
    needed: bool = True
    remedy: str = ""


def run(deep: bool = False) -> int:
    """Print the table; 0 when everything needed is there, else 1. ``deep`` also starts Ray and uses an MLflow store."""
    findings = [python(), *packages(), *compilers(), gpu(), cores(), memory(), shared_memory(), disk()]
    if deep:
        findings += [attempt("Ray", start_ray), attempt("MLflow", write_mlflow)]
    show(findings, Console(highlight=False))
    return 0 if fit(findings) else 1


def fit(findings: list[Finding]) -> bool:
    """Whether nothing needed is missing."""
    return all(finding.good or not finding.needed for finding in findings)


def python() -> Finding:
    """The interpreter."""
    found = ".".join(str(part) for part in sys.version_info[:3])
    return Finding("python", found, sys.version_info >= (3, 11), remedy="install Python 3.11 or newer")


def packages(distribution: str = "mmada") -> list[Finding]:
    """The versions of what mmada needs, as its own metadata lists them."""
    try:
        lines = requires(distribution) or []
    except PackageNotFoundError:
        return [Finding(distribution, "not installed", good=False, remedy=INSTALL)]
    needs = [Requirement(line) for line in lines]
    return [package(need) for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]


def package(need: Requirement) -> Finding:
    """One requirement and the version that meets it, or not."""
    try:
        found = version(need.name)
    except PackageNotFoundError:
        return Finding(need.name, "not installed", good=False, remedy=INSTALL)
    good = need.specifier.contains(found, prereleases=True)
    return Finding(need.name, found, good, remedy=f"{need.name}{need.specifier} is needed; {INSTALL}")


def compilers(find: Callable[[str], str | None] = shutil.which) -> list[Finding]:
    """What DeepSpeed's own kernels are built with (besides ninja, a package); a run on CPUs does without them."""
    remedy = "install it for DeepSpeed's own kernels (Debian: apt-get install build-essential)"
    places = {tool: find(tool) for tool in ("gcc", "g++")}
    return [
        Finding(tool, place or "not found", place is not None, needed=False, remedy=remedy)
        for tool, place in places.items()
    ]


def gpu() -> Finding:
    """CUDA devices that torch can use."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return Finding("GPU", f"torch cannot be imported: {error}", good=False, remedy=INSTALL)
    if not torch.cuda.is_available():
        remedy = "set cluster.gpus_per_worker=0 here; for a GPU, install its driver and a CUDA build of torch"
        return Finding("GPU", "none", good=False, needed=False, remedy=remedy)
    names = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return Finding("GPU", ", ".join(f"{each.name} ({each.total_memory / GIB:.0f} GiB)" for each in names))


def cores() -> Finding:
    """Cores that this process may use."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    remedy = "two workers share one core: expect half the speed"
    return Finding("cores", str(count), count >= 2, needed=False, remedy=remedy)


def memory(available: int | None = None) -> Finding:
    """Memory that is free now. All processes of `mmada train debug` together peaked at 5.7 GiB (their PSS, summed)."""
    free = psutil.virtual_memory().available if available is None else available
    remedy = f"free {LEAST_MEMORY / GIB:.0f} GiB, or use cluster.workers=1"
    return Finding("memory free", f"{free / GIB:.1f} GiB", free >= LEAST_MEMORY, remedy=remedy)


def shared_memory(folder: Path = Path("/dev/shm"), least: int = GIB // 4) -> Finding:
    """Where Ray keeps its objects; too little and it falls back to slow files in /tmp."""
    if not folder.is_dir():
        return Finding("shared memory", f"no {folder}", good=False, needed=False, remedy="mount a tmpfs there")
    free = shutil.disk_usage(folder).free
    remedy = "give the container more (docker run --shm-size=1g)"
    return Finding("shared memory", f"{free / GIB:.1f} GiB in {folder}", free >= least, needed=False, remedy=remedy)


def disk(folder: Path | None = None, least: int = 2 * GIB) -> Finding:
    """Room for runs, and the right to write there."""
    folder = Path.cwd() if folder is None else folder
    free = shutil.disk_usage(folder).free
    if not os.access(folder, os.W_OK):
        return Finding("disk", f"{folder} cannot be written to", good=False, remedy="go where you may, or set run.dir")
    remedy = "free some, or set run.dir to a larger disk"
    return Finding("disk", f"{free / GIB:.1f} GiB in {folder}", free >= least, remedy=remedy)


def attempt(what: str, work: Callable[[Path], str]) -> Finding:
    """Do something for real in a folder of its own that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="mmada-doctor-") as folder:
        try:
            return Finding(what, work(Path(folder)))
        except Exception as error:  # whatever goes wrong in there is the finding
            reason = " ".join(str(error).split()) or type(error).__name__
            return Finding(what, f"failed: {reason[:200]}", good=False, remedy=f"see what {what} says; {INSTALL}")


def start_ray(folder: Path) -> str:
    """Start Ray for one worker and stop it."""
    from cluster.session import RaySession
    from cluster.terminal import quiet_terminal

    with (
        quiet_terminal(folder / "ray.log"),
        RaySession(None, workers=1, cpus_per_worker=1, gpus_per_worker=0, log_dir=folder, timeout_s=60) as session,
    ):
        return f"started at {session.gcs_address} and stopped"


def write_mlflow(folder: Path) -> str:
    """Write a run to an SQLite store and read it back."""
    from cluster.terminal import quiet_terminal
    from cluster.tracking import Tracker

    with quiet_terminal(folder / "mlflow.log"):
        tracker = Tracker(None, "doctor", run_dir=folder / "run", run_name="doctor", run_id=None)
        tracker.start({"run.name": "doctor"})
        tracker.log(1, {"loss": 1.0})
        tracker.finish("done")
    return f"wrote a run to {tracker.uri}"


def show(findings: list[Finding], console: Console) -> None:
    """The table, what is missing, and the verdict."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("", "what", "found"):
        table.add_column(column)
    for finding in findings:
        mark = "[green]ok[/green]" if finding.good else "[red]no[/red]" if finding.needed else "[yellow]--[/yellow]"
        table.add_row(mark, Text(finding.what), Text(finding.found))
    console.print(table)
    for finding in findings:
        if not finding.good:
            console.print(Text(f"{finding.what}: {finding.found}; {finding.remedy}"), soft_wrap=True)
    verdict = "everything needed is there" if fit(findings) else "something needed is missing"
    console.print(verdict)
