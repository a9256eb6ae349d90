"""Checkpoints that must survive: full disks, kill -9, flipped bytes, and their own clean-up."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.checkpoints import MANIFEST, CheckpointDamaged, CheckpointStore, full_disk_named
from cluster.errors import ClusterError

REPOSITORY = Path(__file__).parents[2]
FILES = {"model.bin": b"weights" * 1000, "ranks/0/optimizer.bin": b"moments" * 500, "empty": b""}


def save(store: CheckpointStore, step: int, metadata: dict | None = None, files: dict | None = None) -> Path:
    partial = store.begin(step)
    entries = {}
    for name, content in (files or FILES).items():
        path = partial / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content + str(step).encode() * (name != "empty"))
        entries.update(store.file_entries(partial, [name]))  # as each rank does for its own
    return store.seal(partial, entries, metadata or {"step": step})


def names(store: CheckpointStore) -> list[str]:
    return sorted(path.name for path in store.root.iterdir())


def refuse(damage: CheckpointDamaged) -> None:
    raise damage


def test_a_sealed_checkpoint_verifies_and_gives_its_metadata_back(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints")
    metadata = {"world": 2, "lr": 0.1, "by_rank": {2: "b", 10: "a"}, "note": "naïve"}
    folder = save(store, 20, metadata)
    assert folder == tmp_path / "checkpoints" / "step-00000020"
    fresh = CheckpointStore(store.root)
    (folder / "zero_to_fp32.py").write_text("a script that DeepSpeed drops here: what is not listed does no harm")
    assert fresh.verify(folder) == {**metadata, "by_rank": {"2": "b", "10": "a"}}
    manifest = json.loads((folder / MANIFEST).read_text())
    assert (manifest["format_version"], manifest["step"]) == (1, 20)
    entry = manifest["files"]["ranks/0/optimizer.bin"]
    assert entry["bytes"] == 3502
    oracle = subprocess.run(["sha256sum", folder / "ranks/0/optimizer.bin"], capture_output=True, text=True, timeout=60)
    assert entry["sha256"] == oracle.stdout.split()[0]


def test_steps_sort_as_numbers_and_other_folders_are_left_alone(tmp_path):
    store = CheckpointStore(tmp_path, keep=9)
    for step in (5, 123456789, 40):
        save(store, step)
    (tmp_path / "step-00000007.bak").mkdir()
    (tmp_path / "step-7").mkdir()
    assert [folder.name for folder in store.list()] == ["step-00000005", "step-00000040", "step-123456789"]
    assert store.discard_partials() == []
    assert (tmp_path / "step-00000007.bak").is_dir()


def flip_byte(path: Path, offset: int = 100) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def edit_manifest(folder: Path, **changes) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, **changes}, indent=1, sort_keys=True) + "\n")


MOMENTS = "ranks/0/optimizer.bin"
DAMAGES = {
    "a flipped byte": (lambda f: flip_byte(f / "model.bin"), "model.bin", "has changed: its sha256 is"),
    "a missing file": (lambda f: (f / MOMENTS).unlink(), MOMENTS, "is missing"),
    "a file cut short": (lambda f: os.truncate(f / "model.bin", 9), "model.bin", "has 9 bytes instead of 7002"),
    "a folder for a file": (
        lambda f: (f / "empty").rename(f / "e") and (f / "empty").mkdir(),
        "empty",
        "is not a file",
    ),
    "no manifest": (lambda f: (f / MANIFEST).unlink(), MANIFEST, "is missing"),
    "a manifest cut short": (lambda f: os.truncate(f / MANIFEST, 50), MANIFEST, "cannot be read (Unterminated"),
    "another version": (lambda f: edit_manifest(f, format_version=2), MANIFEST, "is of format version 2, this program"),
    "another step": (lambda f: edit_manifest(f, step=21), MANIFEST, "does not match its own checksum"),
    "other metadata": (lambda f: edit_manifest(f, metadata={}), MANIFEST, "does not match its own checksum"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_used(tmp_path, damage):
    harm, file, reason = DAMAGES[damage]
    store = CheckpointStore(tmp_path)
    older, newer = save(store, 10), save(store, 20)
    harm(newer)
    refused: list[CheckpointDamaged] = []
    assert store.newest_good(refused.append) == older
    (error,) = refused
    assert (error.folder, error.file) == (newer, file)
    assert error.reason.startswith(reason)
    assert str(error).startswith(f"checkpoint={newer} is damaged: {file} ")
    assert "\n" not in str(error)
    copy = pickle.loads(pickle.dumps(error))  # as Ray brings it from a worker
    assert (str(copy), copy.folder, copy.file, copy.reason) == (str(error), newer, file, error.reason)


def test_every_single_byte_counts(tmp_path):
    folder = save(CheckpointStore(tmp_path), 10, files={"model.bin": b"weights"})
    for path in (folder / "model.bin", folder / MANIFEST):
        content = path.read_bytes()
        for offset in range(len(content)):
            flip_byte(path, offset)
            with pytest.raises(CheckpointDamaged):
                CheckpointStore(tmp_path).verify(folder)
            path.write_bytes(content)
    assert CheckpointStore(tmp_path).verify(folder) == {"step": 10}


def test_no_checkpoint_at_all(tmp_path):
    store = CheckpointStore(tmp_path / "nothing")
    assert store.newest_good(refuse) is None
    assert store.list() == []
    assert store.discard_partials() == []
    free = shutil.disk_usage(tmp_path).free
    store.free_space_check()
    store.free_space_check(1)
    with pytest.raises(ClusterError, match=f"a checkpoint needs {free * 2:,} bytes and"):
        store.free_space_check(free * 2)
    with pytest.raises(CheckpointDamaged, match="MANIFEST.json is missing, as is the folder"):
        store.verify(tmp_path / "nothing" / "step-00000010")


def test_what_was_not_written_is_not_sealed(tmp_path):
    store = CheckpointStore(tmp_path)
    save(store, 10)
    partial = store.begin(20)
    (partial / "model.bin").write_bytes(b"weights")
    entries = store.file_entries(partial, ["model.bin"])
    (partial / "model.bin").write_bytes(b"weigh")  # a node whose last blocks did not arrive
    with pytest.raises(CheckpointDamaged, match="model.bin has 5 bytes instead of 7"):
        store.seal(partial, entries, {})
    with pytest.raises(CheckpointDamaged, match="gone.bin is missing"):
        store.seal(partial, {"gone.bin": {"bytes": 0, "sha256": ""}}, {})
    with pytest.raises(TypeError, match="object is not JSON serializable"):
        store.seal(partial, entries, {"x": object()})
    for wrong in ("/etc/passwd", "../step-00000010/model.bin", MANIFEST, "."):
        with pytest.raises(ValueError, match="is not the path of a file inside a checkpoint"):
            store.file_entries(partial, [wrong])
    with pytest.raises(ValueError, match="lists no file"):
        store.seal(partial, {}, {})
    with pytest.raises(ValueError, match="was not begun in"):
        store.seal(tmp_path / "elsewhere" / partial.name, entries, {})
    assert names(store) == ["step-00000010", "step-00000020.partial"]


def test_the_newest_good_ones_are_kept(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for step in (10, 20, 30):
        save(store, step)
    assert names(store) == ["step-00000020", "step-00000030"]
    flip_byte(tmp_path / "step-00000030" / "model.bin")
    save(store, 40)  # 30 is no good one: 20 and 40 are the two
    assert names(store) == ["step-00000020", "step-00000030", "step-00000040"]
    save(store, 50)
    assert names(store) == ["step-00000040", "step-00000050"]
    path = tmp_path / "step-00000050" / "model.bin"
    before = path.stat()
    flip_byte(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    save(CheckpointStore(tmp_path, keep=2), 60)  # another process: it has seen none of them good and reads them
    assert names(store) == ["step-00000040", "step-00000050", "step-00000060"]
    with pytest.raises(ValueError, match="keep=0 would delete every checkpoint"):
        CheckpointStore(tmp_path, keep=0)


def test_a_step_saved_again_takes_the_place_of_the_old_one(tmp_path):
    store = CheckpointStore(tmp_path)
    save(store, 10)
    flip_byte(save(store, 20) / "model.bin")
    again = save(store, 20, {"attempt": 2})
    assert CheckpointStore(tmp_path).verify(again) == {"attempt": 2}
    assert names(store) == ["step-00000010", "step-00000020"]


class KilledError(BaseException):
    """Stands for the process dying at this point: nothing of the program may handle it."""


@pytest.mark.parametrize("again", [False, True])
def test_a_death_at_any_operation_of_sealing_leaves_a_good_checkpoint(tmp_path, monkeypatch, again):
    died = 0
    for last_operation in range(100):
        root = tmp_path / str(last_operation)
        store = CheckpointStore(root, keep=1)
        save(store, 10)
        if again:
            save(store, 20)
        partial = store.begin(20)
        (partial / "model.bin").write_bytes(b"new")
        entries = store.file_entries(partial, ["model.bin"])
        left = iter(range(last_operation))

        def counted(operation, left=left):
            def run(*arguments, **named):
                if next(left, None) is None:
                    raise KilledError
                return operation(*arguments, **named)

            return run

        with monkeypatch.context() as patch:
            for owner, name in ((Path, "rename"), (os, "fsync"), (os, "unlink"), (os, "rmdir")):
                patch.setattr(owner, name, counted(getattr(owner, name)))
            try:
                store.seal(partial, entries, {"step": 20})
                sealed = True
            except KilledError:
                sealed = False
                died += 1
        fresh = CheckpointStore(root, keep=1)
        fresh.discard_partials()
        good = fresh.newest_good(refuse)
        assert good is not None, f"nothing good after operation {last_operation}"
        assert all(len(path.name) == len("step-00000010") for path in root.iterdir())
        assert not sealed or good.name == "step-00000020"
        if sealed:
            break
    assert sealed and died >= 6  # the manifest, its folder, the rename, the root, and the old one's files


def test_kill_9_in_the_middle_of_writing(tmp_path):
    script = """
import sys
from pathlib import Path
from cluster.checkpoints import CheckpointStore
store = CheckpointStore(Path(sys.argv[1]))
partial = store.begin(20)
with open(partial / "model.bin", "wb") as file:
    while True:
        file.write(b"x" * 1000)
        file.flush()
        print("writing", flush=True)
"""
    store = CheckpointStore(tmp_path)
    good = save(store, 10)
    writer = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    assert [writer.stdout.readline() for _ in range(3)] == ["writing\n"] * 3
    writer.kill()
    writer.communicate(timeout=60)
    assert names(store) == ["step-00000010", "step-00000020.partial"]
    fresh = CheckpointStore(tmp_path)
    assert fresh.newest_good(refuse) == good
    leftover = tmp_path / "step-00000020.partial"
    assert list(fresh.begin(20).iterdir()) == []  # begun again it is empty
    assert fresh.discard_partials() == [leftover]
    assert names(fresh) == ["step-00000010"]


def mounted(disk: Path) -> list[str]:
    """How to run a command that sees a file system of two megabytes at `disk`."""
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=2m tmpfs {disk}"
    for unshare in (["unshare", "-m"], ["unshare", "-r", "-m"]):  # in a namespace of its own: gone with the command
        if shutil.which("unshare") and subprocess.run([*unshare, "sh", "-c", mount], timeout=60).returncode == 0:
            return [*unshare, "sh", "-c", f'{mount} && exec "$@"', "sh"]
    pytest.skip("the kernel lets nobody here mount a file system, so there is none that can be filled")


LIMITED = ["sh", "-c", 'ulimit -f 1900; exec "$@"', "sh"]  # in blocks of 512 bytes: another errno, the same end


def run_in(surroundings: list[str], script: str, disk: Path, *arguments: str) -> dict[str, str]:
    """Run a script; its lines of "name message"."""
    command = [*surroundings, sys.executable, "-c", script, str(disk), *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return dict(line.split(" ", 1) for line in done.stdout.splitlines())


FULL_DISK = """
import sys
from pathlib import Path
import numpy, safetensors.numpy, torch
from cluster.checkpoints import CheckpointStore, full_disk_named
from cluster.errors import ClusterError

root = Path(sys.argv[1]) / "checkpoints"
store = CheckpointStore(root)
partial = store.begin(10)
(partial / "model.bin").write_bytes(b"x" * 900_000)
good = store.seal(partial, store.file_entries(partial, ["model.bin"]), {"step": 10})

zeros = numpy.zeros(1_500_000, dtype=numpy.uint8)
writers = {
    "open": lambda path: path.write_bytes(zeros.tobytes()),
    "torch": lambda path: torch.save({"x": torch.from_numpy(zeros)}, path),
    "safetensors": lambda path: safetensors.numpy.save_file({"x": zeros}, path),
}
for name in sys.argv[2:]:
    partial = store.begin(20)
    try:
        with full_disk_named(root, 1_500_000):
            writers[name](partial / "model.bin")
        print(name, "wrote it all")
    except ClusterError as error:
        print(name, error)
    store.abandon(partial)
    assert store.newest_good(print) == good
    assert [path.name for path in root.iterdir()] == ["step-00000010"]
"""


def assert_named(message: str, disk: Path, needed: str) -> None:
    start, end = message.split(" bytes are free; ")
    assert start.startswith(f"checkpoint folder={disk}/checkpoints is full: a checkpoint needs {needed} bytes and ")
    assert end.startswith("free some space, keep fewer checkpoints, or set run.dir to a larger disk")


def test_a_full_disk_is_named_whatever_library_writes(tmp_path):
    disk = tmp_path / "disk"
    said = run_in(mounted(disk), FULL_DISK, disk, "open", "torch", "safetensors")
    assert list(said) == ["open", "torch", "safetensors"]
    for message in said.values():
        assert_named(message, disk, "1,500,000")


def test_a_limit_on_the_size_of_files_is_named_too(tmp_path):
    script = (
        FULL_DISK
        + """
partial = store.begin(30)
(partial / "model.bin").write_bytes(b"x")
try:
    store.seal(partial, store.file_entries(partial, ["model.bin"]), {"long": "x" * 2_000_000})
except ClusterError as error:
    print("sealing", error)
assert [path.name for path in root.iterdir()] == ["step-00000010"]
"""
    )
    (disk := tmp_path / "disk").mkdir()
    said = run_in(LIMITED, script, disk, "open")
    assert_named(said["open"], disk, "1,500,000")
    assert_named(said["sealing"], disk, "1")


def test_a_disk_that_fills_up_while_sealing_leaves_the_last_good_one(tmp_path):
    script = """
import shutil, sys
from pathlib import Path
from cluster.checkpoints import CheckpointStore
from cluster.errors import ClusterError

disk = Path(sys.argv[1])
store = CheckpointStore(disk / "checkpoints")

def fill(leave):
    (disk / "other").write_bytes(bytes(shutil.disk_usage(disk).free - leave))

def save(step):
    partial = store.begin(step)
    (partial / "model.bin").write_bytes(b"x" * 900_000)
    entries = store.file_entries(partial, ["model.bin"])
    if step == 30:
        fill(leave=0)
    return store.seal(partial, entries, {"step": step})

good = save(10)
fill(leave=512 * 1024)
for step in (20, 30):  # 20: less free than the last one took, seen before a byte is written; 30: full at the manifest
    try:
        save(step)
    except ClusterError as error:
        print(step, error)
    assert store.newest_good(print) == good
    assert store.verify(good) == {"step": 10}
    assert [path.name for path in (disk / "checkpoints").iterdir()] == ["step-00000010"]
    (disk / "other").unlink()
print("40", save(40).name)
"""
    disk = tmp_path / "disk"
    said = run_in(mounted(disk), script, disk)
    assert_named(said["20"], disk, "900,000")
    assert " and 524,288 bytes are free" in said["20"]
    assert_named(said["30"], disk, "900,000")
    assert said["40"] == "step-00000040"


def test_other_errors_pass_unchanged(tmp_path):
    for error in (PermissionError("no"), RuntimeError("shape mismatch"), ClusterError("mine")):
        with pytest.raises(type(error)) as raised, full_disk_named(tmp_path):
            raise error
        assert raised.value is error
