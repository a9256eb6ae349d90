"""Checkpoints on a POSIX folder that all nodes share: written aside, checked, then made current.

A checkpoint being written is `step-00000020.partial`. Sealing it checks the files against what the ranks wrote,
writes MANIFEST.json last and renames the folder to `step-00000020`; only then are older ones deleted. Whatever
happens in between, the last good checkpoint stays where it was.
"""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from cluster.errors import CheckpointDamaged, ClusterError

__all__ = ["CheckpointDamaged", "CheckpointStore", "FORMAT_VERSION", "MANIFEST", "full_disk_named"]

FORMAT_VERSION = 1
MANIFEST = "MANIFEST.json"
PARTIAL, REPLACED, DELETED = ".partial", ".replaced", ".deleted"
SEALED_NAME = re.compile(r"step-(\d{8,})")
HASHING_THREADS = min(8, os.cpu_count() or 1)

# EFBIG is the same to the user: the file may not grow (`ulimit -f`).
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
ALMOST_NOTHING = 1 << 20  # a writer that fails with no errno and leaves less than 1 MiB free has filled the disk

logger = logging.getLogger(__name__)


class CheckpointStore:
    """The checkpoints of one run, in one folder.

    Args:
        root: folder that holds them; created when the first is begun.
        keep: how many good ones to keep, at least 1.
    """

    def __init__(self, root: Path, keep: int = 2):
        if keep < 1:
            raise ValueError(f"keep={keep} would delete every checkpoint; use 1 or more")
        self.root = Path(root).absolute()
        self.keep = keep
        self._verified: dict[Path, object] = {}  # folder -> its files' state when their checksums were right

    def begin(self, step: int) -> Path:
        """An empty folder to write the checkpoint of this step into; what was left of an earlier attempt is removed.

        Raises:
            ClusterError: there is less room than the last checkpoint took.
        """
        if step < 0:
            raise ValueError(f"step={step} is negative")
        partial = self.root / f"step-{step:08d}{PARTIAL}"
        self.abandon(partial)
        with full_disk_named(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            self.free_space_check()
            partial.mkdir()
            _sync_folder(self.root)
        return partial

    def file_entries(self, folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Sizes and checksums of files that this process wrote: {relative path: {"bytes": int, "sha256": hex}}.

        The files are flushed to disk too, so this is called on the node that wrote them, by any rank.
        """
        paths = {_relative(name): Path(folder) / name for name in names}
        with full_disk_named(self.root, self._last_bytes()), ThreadPoolExecutor(HASHING_THREADS) as pool:
            return dict(zip(paths, pool.map(_entry, paths.values()), strict=True))

    def seal(self, partial: Path, entries: dict[str, dict[str, Any]], metadata: dict[str, Any]) -> Path:
        """Make a written checkpoint the current one, then delete the oldest beyond `keep`.

        Args:
            partial: the folder from `begin`.
            entries: what all ranks' `file_entries` returned, merged.
            metadata: anything JSON can say; `verify` gives it back.

        Returns:
            The sealed folder.

        Raises:
            CheckpointDamaged: a listed file is not there or not of its size; nothing is sealed.
            ClusterError: the disk is full; the partial folder is removed, older checkpoints stay.
        """
        partial = Path(partial).absolute()
        step = _step(partial.name.removesuffix(PARTIAL))
        if partial.parent != self.root or step is None or not partial.name.endswith(PARTIAL):
            raise ValueError(f"{partial} was not begun in {self.root}")
        if not entries:
            raise ValueError(f"{partial.name} lists no file")
        text = _render(step, metadata, {_relative(name): entry for name, entry in entries.items()})
        for name, entry in entries.items():
            _check_size(partial, name, entry["bytes"])
        try:
            with full_disk_named(self.root, sum(entry["bytes"] for entry in entries.values())):
                _write_synced(partial / MANIFEST, text)
                for folder in {partial, *((partial / name).parent for name in entries)}:
                    _sync_folder(folder)
        except ClusterError:
            self.abandon(partial)
            raise
        sealed = partial.with_suffix("")
        replaced = sealed.with_name(sealed.name + REPLACED)
        if sealed.exists():  # an earlier one of this step, damaged or made by a run that was continued from before it
            sealed.rename(replaced)
        partial.rename(sealed)
        _sync_folder(self.root)
        self._verified[sealed] = _state(sealed, entries)
        self._delete(replaced)
        self._prune(sealed)
        return sealed

    def abandon(self, partial: Path) -> None:
        """Remove a checkpoint that was begun and will not be sealed; nothing happens where there is none."""
        if not partial.name.endswith(PARTIAL):
            raise ValueError(f"{partial} is not a partial checkpoint")
        if partial.exists():
            shutil.rmtree(partial)

    def verify(self, folder: Path) -> dict[str, Any]:
        """Check every file against the manifest, checksums included, and return the metadata given to `seal`.

        Files that the manifest does not list are left alone.

        Raises:
            CheckpointDamaged: names the first file that is missing, changed or unreadable.
        """
        folder = Path(folder).absolute()
        manifest = _read_manifest(folder)
        files = manifest["files"]
        for name, entry in files.items():
            _check_size(folder, name, entry["bytes"])
        before = _state(folder, files)
        with ThreadPoolExecutor(HASHING_THREADS) as pool:
            list(pool.map(lambda item: _check_sum(folder, item[0], item[1]["sha256"]), files.items()))
        self._verified[folder] = before
        return manifest["metadata"]

    def newest_good(self, on_damaged: Callable[[CheckpointDamaged], None]) -> Path | None:
        """The newest checkpoint that verifies, or None; each newer one that does not is given to `on_damaged`."""
        for folder in reversed(self.list()):
            try:
                self.verify(folder)
            except CheckpointDamaged as damage:
                on_damaged(damage)
            else:
                return folder
        return None

    def list(self) -> Sequence[Path]:
        """Sealed checkpoints, oldest first, unverified."""
        folders = self.root.iterdir() if self.root.is_dir() else ()
        steps = [(step, folder) for folder in folders if (step := _step(folder.name)) is not None]
        return [folder for _, folder in sorted(steps)]

    def discard_partials(self) -> Sequence[Path]:
        """Remove what an interrupted save or deletion left; to be called when a run starts. Returns what it removed."""
        removed = []
        for folder in sorted(self.root.iterdir()) if self.root.is_dir() else ():
            name, suffix = folder.stem, folder.suffix
            if _step(name) is None or suffix not in (PARTIAL, REPLACED, DELETED):
                continue
            if suffix == REPLACED and not folder.with_suffix("").exists():
                folder.rename(folder.with_suffix(""))  # the new one of that step never took its place
                continue
            shutil.rmtree(folder)
            removed.append(folder)
        return removed

    def free_space_check(self, needed_bytes: int | None = None) -> None:
        """Refuse to begin what cannot be finished.

        Args:
            needed_bytes: size of the checkpoint to come; None for the size of the newest one, if there is one.

        Raises:
            ClusterError: names the folder, the bytes needed, the bytes free and what to do.
        """
        needed = self._last_bytes() if needed_bytes is None else needed_bytes
        if needed is not None and _free(self.root) < needed:
            raise _full(self.root, needed)

    def _last_bytes(self) -> int | None:
        for folder in reversed(self.list()):
            try:
                return sum(entry["bytes"] for entry in _read_manifest(folder)["files"].values())
            except CheckpointDamaged:
                continue
        return None

    def _prune(self, newest: Path) -> None:
        """Delete what is older than the newest `keep` good ones. A damaged one among those is no good one."""
        good = 0
        for folder in reversed(self.list()):
            if good >= self.keep and folder != newest:
                self._delete(folder)
            elif self._is_good(folder):
                good += 1

    def _is_good(self, folder: Path) -> bool:
        try:
            known = self._verified.get(folder)
            # Reading gigabytes again at every save would be paid for nothing: files whose size and time of change
            # are as when their checksums were right are taken as right. Loading always verifies.
            if known is None or known != _state(folder, _read_manifest(folder)["files"]):
                self.verify(folder)
        except CheckpointDamaged as damage:
            logger.warning("%s", damage)
            return False
        return True

    def _delete(self, folder: Path) -> None:
        """Delete a folder under another name, so that one half deleted is never taken for a checkpoint."""
        if not folder.exists():
            return
        doomed = folder.with_suffix(DELETED)
        try:
            if doomed.exists():
                shutil.rmtree(doomed)
            shutil.rmtree(folder.rename(doomed))
        except OSError as error:  # the new checkpoint is safe: a leftover is no reason to end the run
            logger.warning("old checkpoint %s could not be deleted: %s", folder, error)
        self._verified.pop(folder, None)


@contextmanager
def full_disk_named(folder: Path, needed_bytes: int | None = None) -> Iterator[None]:
    """Turn "no space left on device" into a ClusterError; to be put around whatever writes a checkpoint.

    Args:
        folder: the checkpoint folder, on the disk in question.
        needed_bytes: size of the whole checkpoint where it is known.

    Raises:
        ClusterError: names the folder, the bytes needed, the bytes free and what to do. Other errors pass unchanged.
    """
    try:
        yield
    except ClusterError:
        raise
    except Exception as error:  # safetensors has an exception of its own, torch's zip writer says nothing of the disk
        told = "No space left on device" in str(error)
        silent = isinstance(error, RuntimeError) and _free(folder) < ALMOST_NOTHING
        if getattr(error, "errno", None) in FULL or told or silent:
            raise _full(folder, needed_bytes) from error
        raise


def _full(folder: Path, needed: int | None) -> ClusterError:
    wants = "more" if needed is None else f"{needed:,} bytes"
    return ClusterError(
        f"checkpoint folder={folder} is full: a checkpoint needs {wants} and {_free(folder):,} bytes are free; "
        "free some space, keep fewer checkpoints, or set run.dir to a larger disk. The last good checkpoint is kept"
    )


def _free(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _step(name: str) -> int | None:
    match = SEALED_NAME.fullmatch(name)
    return int(match[1]) if match else None


def _relative(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or str(path) == MANIFEST:
        raise ValueError(f"{name!r} is not the path of a file inside a checkpoint")
    return str(path)


def _render(step: int, metadata: dict[str, Any], files: dict[str, dict[str, Any]]) -> str:
    """The manifest's text. It carries its own checksum, so that a changed step or metadata is found too."""
    body = {"format_version": FORMAT_VERSION, "step": step, "metadata": metadata, "files": files}
    body = json.loads(json.dumps(body))  # as it will be read: keys that are numbers become text and sort differently
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "manifest_sha256": digest}, indent=1, sort_keys=True) + "\n"


def _read_manifest(folder: Path) -> dict[str, Any]:
    def damaged(reason: str) -> CheckpointDamaged:
        return CheckpointDamaged(folder, MANIFEST, reason)

    try:
        text = (folder / MANIFEST).read_bytes().decode()
        manifest = json.loads(text)
    except FileNotFoundError as error:
        reason = "is missing" if folder.is_dir() else "is missing, as is the folder"
        raise damaged(reason) from error
    except (OSError, ValueError) as error:  # ValueError: neither UTF-8 nor JSON
        raise damaged(f"cannot be read ({error})") from error
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise damaged(f"is of format version {version!r}, this program reads {FORMAT_VERSION}")
    try:
        same = _render(manifest["step"], manifest["metadata"], manifest["files"]) == text
    except KeyError as error:
        raise damaged(f"has no {error}") from error
    if not same:
        raise damaged("does not match its own checksum")
    return manifest


def _entry(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": digest}


def _check_size(folder: Path, name: str, expected: int) -> None:
    try:
        found = (folder / name).stat()
    except FileNotFoundError as error:
        raise CheckpointDamaged(folder, name, "is missing") from error
    except OSError as error:
        raise CheckpointDamaged(folder, name, f"cannot be read ({error})") from error
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointDamaged(folder, name, "is not a file")
    if found.st_size != expected:
        raise CheckpointDamaged(folder, name, f"has {found.st_size} bytes instead of {expected}")


def _check_sum(folder: Path, name: str, expected: str) -> None:
    try:
        with open(folder / name, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointDamaged(folder, name, f"cannot be read ({error})") from error
    if found != expected:
        raise CheckpointDamaged(folder, name, f"has changed: its sha256 is {found[:12]}… instead of {expected[:12]}…")


def _state(folder: Path, files: Iterable[str]) -> object:
    try:
        found = [(name, (folder / name).stat()) for name in sorted([*files, MANIFEST])]
    except OSError:
        return None  # equal to no state of a good checkpoint
    return [(name, of.st_size, of.st_mtime_ns, of.st_ino) for name, of in found]


def _write_synced(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make names in a folder durable: fsync of a file does not cover its directory entry."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
