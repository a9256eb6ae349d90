"""What travels to a cluster with a job: mmada as it stands here, the recipe, and files that are named."""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from jobs.recipe import RecipeError

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("cluster", "jobs", "mmada")
ALSO = ("pyproject.toml", "constraints.txt")
# Folders of the package. The job's own side (``jobs.submission.inside``) looks for them there.
RECIPES, FILES = "submitted", "sent"
LIMIT = 100 * 2**20
LEFT_OUT = {".git", ".venv", "venv", "runs", "mlruns", "mlartifacts", "node_modules", "__pycache__"}
_MIB = 2**20
_TIME = (1980, 1, 1, 0, 0, 0)  # the earliest of a zip file: the same files make the same package, whenever


@dataclass(frozen=True)
class Package:
    """A zip file whose name follows from its content, as Ray wants it."""

    content: bytes
    num_files: int

    @property
    def name(self) -> str:
        """Its name on the cluster."""
        return f"_ray_pkg_{hashlib.sha256(self.content).hexdigest()[:32]}.zip"

    @property
    def size(self) -> str:
        """What goes over the wire, in words."""
        return f"{len(self.content) / _MIB:.1f} MiB"


def make_package(recipe: Path | None, named: Iterable[str] = (), root: Path = ROOT, limit: int = LIMIT) -> Package:
    """Pack mmada's own packages, the recipe's file, and the files and folders that ``named`` lists.

    ``named`` lie below the working directory and keep their place in relation to it. Environments, runs, caches and
    what begins with a dot stay here. ``limit``: bytes of all files together.

    Raises RecipeError for a name that cannot travel, and for more than the limit.
    """
    files: dict[str, Path] = {}
    for top in PACKAGES:
        files |= {f"{top}/{name}": file for name, file in _below(root / top)}
    files |= {name: root / name for name in ALSO if (root / name).is_file()}
    if recipe is not None:
        files[f"{RECIPES}/{recipe.name}"] = recipe
    for name in named:
        files |= {f"{FILES}/{place}": file for place, file in _named(name)}
    sizes = {name: file.stat().st_size for name, file in files.items()}
    if (whole := sum(sizes.values())) > limit:
        largest = max(sizes, key=lambda name: sizes[name])
        raise RecipeError(
            f"what would be sent is {whole / _MIB:,.0f} MiB, and at most {limit / _MIB:,.0f} MiB travel with a job "
            f"(the largest file is {largest.removeprefix(FILES + '/')}, {sizes[largest] / _MIB:,.0f} MiB); put data on "
            "storage of the cluster and name it by its path there"
        )
    into = io.BytesIO()
    with zipfile.ZipFile(into, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, _TIME)
            entry.external_attr, entry.compress_type = 0o644 << 16, zipfile.ZIP_DEFLATED
            archive.writestr(entry, files[name].read_bytes())
    return Package(into.getvalue(), len(files))


def _named(name: str) -> Iterator[tuple[str, Path]]:
    """The files of one name, each with its place in relation to the working directory."""
    path, here = Path(name).expanduser().absolute(), Path.cwd()
    if not path.exists():
        raise RecipeError(f"--with={name} does not exist; name a file or folder of the working directory")
    if not path.is_relative_to(here) or path == here or ".." in path.parts:
        raise RecipeError(
            f"--with={name} is not below the working directory ({here}), and would have no place in the job's; go to "
            "its folder, or put it on storage of the cluster"
        )
    place = path.relative_to(here).as_posix()
    if path.is_file():
        yield place, path
        return
    for inner, file in _below(path):
        yield f"{place}/{inner}", file


def _below(folder: Path) -> Iterator[tuple[str, Path]]:
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(each for each in folders if each not in LEFT_OUT and not each.startswith("."))
        for name in sorted(names):
            file = Path(parent) / name
            if not name.startswith(".") and not name.endswith(".pyc") and file.is_file():
                yield file.relative_to(folder).as_posix(), file
