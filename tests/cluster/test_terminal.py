"""What reaches the user's terminal and what goes to the log."""

import ctypes
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.terminal import quiet_terminal

REPOSITORY = Path(__file__).parents[2]
LIBC = ctypes.CDLL(None)


def test_everything_goes_to_the_log_and_our_lines_to_the_terminal(tmp_path, capfd):
    log = tmp_path / "logs" / "run.log"
    print("before")
    with quiet_terminal(log) as terminal:
        print("from python")
        print("from python's stderr", file=sys.stderr)
        os.write(1, b"from a descriptor\n")
        os.write(2, b"from descriptor 2\n")
        LIBC.puts(b"from a C library")
        subprocess.run(["sh", "-c", "echo from a child; echo from its stderr >&2"], check=True, timeout=60)
        terminal.write("step 1\n")
    print("after")
    out, err = capfd.readouterr()
    assert out.splitlines() == ["before", "step 1", "after"]
    assert err == ""
    assert sorted(log.read_text().splitlines()) == sorted(
        [
            "from python",
            "from python's stderr",
            "from a descriptor",
            "from descriptor 2",
            "from a C library",
            "from a child",
            "from its stderr",
        ]
    )


def test_the_log_is_appended_to(tmp_path):
    log = tmp_path / "run.log"
    log.write_text("an earlier run\n")
    with quiet_terminal(log):
        print("this run")
    assert log.read_text() == "an earlier run\nthis run\n"


def test_an_exception_restores_the_terminal(tmp_path, capfd):
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ZeroDivisionError), quiet_terminal(tmp_path / "run.log"):
        print("hidden")
        1 / 0  # noqa: B018
    os.write(1, b"shown\n")
    os.write(2, b"shown too\n")
    assert capfd.readouterr() == ("shown\n", "shown too\n")
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_a_log_that_cannot_be_opened_redirects_nothing(tmp_path, capfd):
    (tmp_path / "run.log").mkdir()
    with pytest.raises(IsADirectoryError), quiet_terminal(tmp_path / "run.log"):
        pass
    os.write(1, b"shown\n")
    assert capfd.readouterr().out == "shown\n"


def test_nested_blocks_keep_their_logs_apart_and_the_terminal_real(tmp_path, capfd):
    with quiet_terminal(tmp_path / "outer.log") as outer:
        print("outer before")
        with quiet_terminal(tmp_path / "inner.log") as inner:
            print("inner")
            inner.write("inner's line\n")
        print("outer after")
        outer.write("outer's line\n")
    assert capfd.readouterr().out == "inner's line\nouter's line\n"
    assert (tmp_path / "outer.log").read_text() == "outer before\nouter after\n"
    assert (tmp_path / "inner.log").read_text() == "inner\n"


def test_a_logging_handler_works_before_inside_and_after(tmp_path):
    # A process of its own: its sys.stderr is the real descriptor 2, as a user's is.
    script = f"""
import logging, sys
from pathlib import Path
from cluster.terminal import quiet_terminal
logging.basicConfig(format="%(message)s", level="INFO")
logging.info("before")
with quiet_terminal(Path({str(tmp_path / "run.log")!r})) as terminal:
    logging.info("inside")
    inner = logging.StreamHandler(sys.stdout)
    logging.getLogger("inner").addHandler(inner)
    logging.getLogger("inner").propagate = False
    terminal.write("line" + chr(10))
logging.info("after")
logging.getLogger("inner").info("made inside, used after")
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "before\nafter\n"
    assert done.stdout == "line\nmade inside, used after\n"
    assert (tmp_path / "run.log").read_text() == "inside\n"


def test_a_handler_made_inside_under_a_replaced_stdout_keeps_working(tmp_path, capfd):
    # Here sys.stdout is the test runner's own object, not descriptor 1.
    with quiet_terminal(tmp_path / "run.log"):
        handler = logging.StreamHandler(sys.stdout)
        handler.handle(logging.LogRecord("x", logging.INFO, "", 0, "inside", (), None))
    handler.handle(logging.LogRecord("x", logging.INFO, "", 0, "after", (), None))
    assert capfd.readouterr().out == "after\n"
    assert (tmp_path / "run.log").read_text() == "inside\n"


def test_a_reader_that_left_does_not_break_the_end(tmp_path):
    script = f"""
import os, sys
from pathlib import Path
from cluster.terminal import quiet_terminal
with quiet_terminal(Path({str(tmp_path / "run.log")!r})) as terminal:
    sys.stdin.read()
    terminal.write("no newline, so it is still in the buffer")
os.write(2, b"restored")
os._exit(0)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    process.stdin.close()
    assert process.stderr.read() == b"restored"
    assert process.wait(timeout=60) == 0
    process.stderr.close()


def test_a_child_left_behind_does_not_hold_the_users_pipe(tmp_path):
    script = f"""
import subprocess
from pathlib import Path
from cluster.terminal import quiet_terminal
with quiet_terminal(Path({str(tmp_path / "run.log")!r})):
    child = subprocess.Popen(["sleep", "60"], start_new_session=True, close_fds=False)
print(child.pid)
"""
    # subprocess.run returns only when nobody has the pipe open any more.
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, timeout=60)
    os.kill(int(done.stdout), 9)
