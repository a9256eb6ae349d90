"""Which rows make up a step's global batch: a pure function of (seed, step), the same for any number of workers."""

from functools import lru_cache

import numpy as np


def global_batch_indices(seed: int, step: int, global_batch: int, num_rows: int) -> np.ndarray:
    """Row numbers of the global batch at `step` (the first step is 0), shape (global_batch,), int64.

    Rows are taken in one endless sequence of epochs, each a permutation of its own of all rows; a batch may begin in
    one epoch and end in the next. So every row comes exactly once per epoch, whatever the batch size.

    Raises:
        ValueError: a count below 1, or a negative seed or step.
    """
    for name, value, least in (
        ("seed", seed, 0),
        ("step", step, 0),
        ("global_batch", global_batch, 1),
        ("num_rows", num_rows, 1),
    ):
        if value < least:
            raise ValueError(f"{name}={value} is too small; use {least} or more")
    positions = np.arange(step * global_batch, (step + 1) * global_batch, dtype=np.int64)
    epochs, rows = np.divmod(positions, num_rows)
    indices = np.empty_like(rows)
    for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
        here = epochs == epoch
        indices[here] = epoch_permutation(seed, epoch, num_rows)[rows[here]]
    return indices


def sample_ids(seed: int, step: int, global_batch: int) -> np.ndarray:
    """A name for each row of a step's global batch, shape (global_batch,), int64: what its random numbers hang on.

    Distinct for distinct (seed, step, place), up to the wrap at 64 bits.
    """
    places = np.arange(step * global_batch, (step + 1) * global_batch, dtype=np.uint64)
    return (places + np.array(seed, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)).view(np.int64)


def rank_slice(indices: np.ndarray, rank: int, world: int) -> np.ndarray:
    """The contiguous part of a global batch that worker `rank` of `world` takes.

    Raises:
        ValueError: the batch does not divide among the workers, or there is no such rank.
    """
    if not 0 <= rank < world:
        raise ValueError(f"rank={rank} is outside 0..{world - 1} (world={world})")
    share, rest = divmod(len(indices), world)
    if rest:
        raise ValueError(
            f"global_batch={len(indices)} is not divisible by world={world}; "
            f"use {max(share, 1) * world}, {(max(share, 1) + 1) * world} … or another number of workers"
        )
    return indices[rank * share : (rank + 1) * share]


def uniform_places(seed: int, step: int, global_batch: int) -> np.ndarray:
    """A number in [0, 1) for each place of a step's global batch, shape (global_batch,): what chooses its source."""
    # Another key than the permutations', which are made of (seed, epoch).
    key = np.array([seed ^ 0x736F7572636573, step], dtype=np.uint64)
    return (np.random.Philox(key=key).random_raw(global_batch) >> np.uint64(11)) / 2.0**53


@lru_cache(maxsize=16)  # a batch needs one epoch of each source, at an epoch's end two
def epoch_permutation(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    """All rows in the order of an epoch, shape (num_rows,); not to be written to."""
    # Sorting raw Philox words rather than Generator.permutation: numpy promises to keep a bit generator's stream from
    # release to release (NEP 19), not what a Generator makes of it.
    words = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(num_rows)
    permutation = np.argsort(words, kind="stable")
    permutation.flags.writeable = False
    return permutation
