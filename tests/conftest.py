"""What all tests share: what markers do, and a clean environment for the processes they start."""

import os

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip `gpu` tests where there is no GPU."""
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu:
        import torch

        if not torch.cuda.is_available():
            for item in on_gpu:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
