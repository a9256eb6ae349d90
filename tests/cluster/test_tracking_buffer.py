"""What is to be sent to MLflow, on disk: cut off, full, locked, half sent. No MLflow in here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.errors import ClusterError
from cluster.tracking_buffer import SEGMENT_BYTES, Buffer
from cluster.tracking_entries import in_words

ROOT = Path(__file__).parents[2]


def metrics(step: int, **values: float) -> dict:
    return {"kind": "metrics", "step": step, "time": 1000 + step, "values": values or {"loss": float(step)}}


def a_file(name: str) -> dict:
    return {"kind": "file", "path": name, "folder": None, "words": f"artifact {name}"}


def opened(folder: Path) -> Buffer:
    buffer = Buffer(folder)
    buffer.open()
    return buffer


def send(buffer: Buffer, lane: str, count: int) -> list[dict]:
    waiting = buffer.waiting(lane, count)
    buffer.sent(lane, waiting[-1][1])
    return [entry for entry, _ in waiting]


def test_lanes_go_at_their_own_pace_and_a_restart_goes_on_where_each_was(tmp_path):
    buffer = opened(tmp_path / "b")
    entries = [metrics(1), a_file("x"), metrics(2), a_file("y"), metrics(3)]
    for entry in entries:
        buffer.append(entry)
    assert send(buffer, "records", 2) == [entries[0], entries[2]]
    buffer.close()
    again = opened(tmp_path / "b")
    assert [entry for entry, _ in again.waiting("records", 9)] == [entries[4]]
    assert [entry for entry, _ in again.waiting("files", 9)] == [entries[1], entries[3]]
    assert list(again.left()) == [entries[4], entries[1], entries[3]]
    assert again.handed.steps("loss") == {1, 2, 3}
    again.append(metrics(4))
    assert send(again, "records", 9) == [entries[4], metrics(4)]
    send(again, "files", 9)
    assert again.is_empty()
    again.close()
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["handed.json", "lock", "sent.json"]
    last = opened(tmp_path / "b")
    assert last.is_empty() and last.handed.steps("loss") == {1, 2, 3, 4}
    last.append(metrics(5))
    assert send(last, "records", 9) == [metrics(5)]


def test_a_long_outage_costs_segments_which_go_as_they_are_sent(tmp_path):
    buffer = opened(tmp_path)
    many = {f"expert_{number}": 0.125 for number in range(1000)}
    steps = 4 * SEGMENT_BYTES // len(json.dumps(metrics(1, **many)))
    for step in range(steps):
        buffer.append(metrics(step, **many))
    assert len(list(tmp_path.glob("*.jsonl"))) in (4, 5)
    seen = 0
    while waiting := buffer.waiting("records", 10):
        seen += len(waiting)
        buffer.sent("records", waiting[-1][1])
        assert buffer.waiting("files", 1) == []  # so that it reads on, too
    assert seen == steps
    assert len(list(tmp_path.glob("*.jsonl"))) == 1
    buffer._guard = -1  # as if killed here
    assert opened_after_a_kill(tmp_path).handed.steps("expert_7") == set(range(steps))


def opened_after_a_kill(folder: Path) -> Buffer:
    (folder / "lock").unlink()  # the lock of a process ends with it
    return opened(folder)


def test_a_line_cut_off_and_a_hole_cost_only_themselves(tmp_path):
    buffer = opened(tmp_path)
    for step in (1, 2, 3):
        buffer.append(metrics(step))
    send(buffer, "records", 3)
    for step in (4, 5, 6):
        buffer.append(metrics(step))
    (file,) = tmp_path.glob("*.jsonl")
    lines = file.read_bytes().splitlines(keepends=True)
    lines[4] = b"\0" * (len(lines[4]) - 1) + b"\n"
    file.write_bytes(b"".join(lines)[:-5])
    again = opened_after_a_kill(tmp_path)
    assert [entry["step"] for entry in again.left()] == [4]
    again.append(metrics(6))
    assert [entry["step"] for entry in again.left()] == [4, 6]
    (tmp_path / "sent.json").write_text('{"records": [1, 99999], "files": [1, 0]}')  # further than what was kept
    assert list(opened_after_a_kill(tmp_path).left()) == []
    (tmp_path / "sent.json").write_text("{")
    assert [entry["step"] for entry in opened_after_a_kill(tmp_path).left()] == [1, 2, 3, 4, 6]


def test_one_process_at_a_time(tmp_path):
    script = "import sys; from cluster.tracking_buffer import Buffer; Buffer(sys.argv[1]).open(); print(1); input()"
    command = [sys.executable, "-c", script, str(tmp_path / "run" / "b")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT) as other:
        assert other.stdout.readline() == "1\n"
        with pytest.raises(ClusterError) as error:
            opened(tmp_path / "run" / "b")
        assert str(error.value) == (
            f"run={tmp_path / 'run'} is being recorded by another process (pid {other.pid}); "
            "wait for its end, or end it"
        )
        other.kill()
    opened(tmp_path / "run" / "b").close()


FULL = """
import json, resource, signal, sys
from pathlib import Path
from cluster.tracking_buffer import Buffer
buffer = Buffer(Path(sys.argv[1]) / "b")
buffer.open()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
def add(step):
    buffer.append({"kind": "metrics", "step": step, "time": 1, "values": {"loss": 0.5}})
before = resource.getrlimit(resource.RLIMIT_FSIZE)
add(0)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
for step in range(1, 100):
    add(step)
first = buffer.waiting("records", 60)
trouble = str(buffer.trouble)
buffer.sent("records", first[-1][1])
rest = [entry["step"] for entry in buffer.left()]
if sys.argv[2] == "freed":
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
print(json.dumps([[entry["step"] for entry, _ in first], rest, trouble, buffer.close()]))
"""


@pytest.mark.parametrize("how", ["freed", "full"])
def test_a_full_disk_stops_nobody_and_is_said(tmp_path, how):
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path), how], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    first, rest, trouble, lost = json.loads(done.stdout)
    assert (first, rest) == (list(range(60)), list(range(60, 100)))
    assert "File too large" in trouble or trouble == "the disk is full"
    assert lost == (0 if how == "freed" else 40)
    left = [entry["step"] for entry in opened(tmp_path / "b").left()]
    assert left == (rest if how == "freed" else [])


def test_many_things_are_one_line():
    entries = [metrics(7, loss=1.0, grad_norm=2.0), metrics(5), *(a_file(f"{name}.txt") for name in "abcdef")]
    entries.append({"kind": "end", "opened": 1, "status": "FAILED", "time": 1})
    assert in_words(entries) == ("3 metrics of steps 5 to 7, 6 artifacts, the status FAILED")
    assert in_words([metrics(5)]) == "1 metric of step 5"
    assert in_words([]) == ""
