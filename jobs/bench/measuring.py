"""What the benches share."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

MATMUL_SIZE = 2048


def matmul_seconds() -> float:
    """One float32 product of two square matrices of MATMUL_SIZE, on the wall clock: the machine's peak."""
    import torch

    left, right, product = torch.randn(3, MATMUL_SIZE, MATMUL_SIZE)
    started = time.perf_counter()
    torch.mm(left, right, out=product)
    return time.perf_counter() - started


def matmul_flops(seconds: float) -> float:
    """FLOP/s of such a product that took so long."""
    return 2 * MATMUL_SIZE**3 / seconds


def file_to_write(text: str) -> Path:
    """Reads the path of a file in a folder that exists, so that nothing is measured in vain."""
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text} lies in no existing folder; make {path.parent} first")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder; name a file")
    return path
