"""What all tests share: what markers do, and a clean environment for the processes they start."""

import contextlib
import os
import signal
from collections.abc import Iterator

import psutil
import pytest

# Set on some machines; every process that a test starts would compile the whole stack anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# Several test files at a time share the cores out.
if os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1") != "1":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# MKL's fast kernels round otherwise where an operand lies otherwise in memory, on some processors: what is compared to
# the bit needs those that do not.
os.environ.setdefault("MKL_CBWR", "COMPATIBLE")
# Tokenizers warn about every fork after their own threads have run.
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# A script's background jobs, this test run perhaps, ignore Ctrl-C, and so would what is started here to be interrupted.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip `gpu` tests where there is no GPU."""
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu:
        import torch

        if not torch.cuda.is_available():
            for item in on_gpu:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_fixture_setup() -> Iterator[object]:
    """What a fixture that fails had started ends with it; those it builds on have been set up before."""
    with _no_process_left_by_a_failure():
        return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call() -> Iterator[None]:
    """What a test that fails had started ends with it, and what that has started: a whole run would take the cores from
    the tests that follow.
    """
    with _no_process_left_by_a_failure():
        return (yield)


@contextlib.contextmanager
def _no_process_left_by_a_failure() -> Iterator[None]:
    before = psutil.Process().children()
    try:
        yield
    except BaseException:
        started = [child for child in psutil.Process().children() if child not in before]
        for process in [*started, *(each for child in started for each in child.children(recursive=True))]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        raise
