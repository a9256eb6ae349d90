"""What Ray Tune keeps of a search on disk, and copies of it that are whole.

Tune writes its files in place and copies them while it writes the next: a driver that is killed then leaves some that
end in the middle, and nothing to go on from. So whole ones are copied here every now and then, and put back.
"""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

_STATE = "experiment_state-*.json"
_KEPT = 2  # copies


def keep_whole(place: Path, copies: Path) -> bool:
    """Copy the files of the search in ``place`` into a new folder below ``copies``; whether that was done.

    It is not where nothing has changed since the newest copy, where a file is torn, or where they change meanwhile.
    """
    before = _times(place)
    numbers = _numbers(copies)
    if not before or (numbers and _times(copies / str(numbers[-1])) == before):
        return False
    aside = copies / "aside"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    for name in before:
        shutil.copy2(place / name, aside / name)  # with its time
    if _times(place) != before or not all(_is_whole(aside / name) for name in before):
        return False
    aside.rename(copies / str(numbers[-1] + 1 if numbers else 1))
    for number in numbers[: 1 - _KEPT]:
        shutil.rmtree(copies / str(number))
    return True


def put_back(place: Path, copies: Path) -> bool:
    """Make what lies in ``place`` whole again; False where nothing is left that a search could go on from."""
    torn = [name for name in _times(place) if not _is_whole(place / name)]
    if torn:
        for name in torn:
            (place / name).unlink()
        numbers = _numbers(copies)
        if numbers:
            shutil.copytree(copies / str(numbers[-1]), place, dirs_exist_ok=True)
    return any(place.glob(_STATE))


def _times(place: Path) -> dict[str, int]:
    """When each of the search's own files was written; those of trials are folders."""
    found = {}
    for path in place.iterdir() if place.is_dir() else ():
        if path.suffix in (".json", ".pkl") and path.is_file():
            found[path.name] = path.stat().st_mtime_ns
    return found


def _numbers(copies: Path) -> list[int]:
    return sorted(int(path.name) for path in copies.glob("[0-9]*"))


def _is_whole(path: Path) -> bool:
    """Whether it can be read to its end."""
    try:
        if path.suffix == ".json":
            json.loads(path.read_text())
        else:
            pickle.loads(path.read_bytes())
    except (ValueError, EOFError, pickle.UnpicklingError):
        return False
    return True
