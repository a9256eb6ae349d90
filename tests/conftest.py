"""What all tests share: what markers do, and a clean environment for the processes they start."""

import os

import pytest

# Set on some machines; every process that a test starts would compile the whole stack anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
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
