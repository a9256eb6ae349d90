"""Where patches of bytes end.

Whether a patch ends at byte t depends on bytes up to t alone, so a text is patched alike when it is read and when it
is written byte by byte. The paper's words name starts: byte t + 1 starts a patch where byte t ends one. Byte 0 is a
patch of its own under every rule, so that each later byte has a finished patch before it.

# B rows, T bytes of this forward pass, S bytes of a sample
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from mmada.config_parts import PatchSettings
from mmada.tokenizer import BYTE_OFFSET, IMAGE_CODE_OFFSET

IN_WORD, SPACE_LIKE, NO_BYTE = 0, 1, 2

# (settings, number of the byte in its document, its reading, the reading before) -> whether a patch ends there.
# What is read of a byte: its class for "space", the entropy of the byte that follows for the rules on entropies.
Rule = Callable[[PatchSettings, Tensor, Tensor, Tensor], Tensor]


def byte_classes(ids: Tensor) -> Tensor:
    """``IN_WORD`` for ASCII letters and digits and UTF-8 continuation bytes, ``NO_BYTE`` for special tokens and image
    codes, ``SPACE_LIKE`` for all else; ids of ``mmada.tokenizer``."""
    byte = ids - BYTE_OFFSET
    lower = byte | 0x20
    in_word = (byte >= 0x30) & (byte <= 0x39) | (lower >= 0x61) & (lower <= 0x7A) & (byte < 0x80)
    in_word = in_word | (byte >= 0x80) & (byte < 0xC0)
    no_byte = (byte < 0) | (ids >= IMAGE_CODE_OFFSET)
    return torch.where(no_byte, NO_BYTE, torch.where(in_word, IN_WORD, SPACE_LIKE))


def entropies(logits_BTV: Tensor) -> Tensor:
    """Entropy in nats of the byte that follows each position, (B, T), in float32 at least."""
    log_p = logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32)).log_softmax(dim=-1)
    return -(log_p.exp() * log_p).sum(dim=-1)


def static_ends(settings: PatchSettings, index: Tensor, reading: Tensor, before: Tensor) -> Tensor:
    """Every ``size`` bytes."""
    return index % settings.size == 0


def space_ends(settings: PatchSettings, index: Tensor, reading: Tensor, before: Tensor) -> Tensor:
    """At the first of a run of space-like bytes, and at everything that is no byte."""
    return (reading == SPACE_LIKE) & (before == IN_WORD) | (reading == NO_BYTE)


def entropy_ends(settings: PatchSettings, index: Tensor, reading: Tensor, before: Tensor) -> Tensor:
    """Where the next byte is hard to guess."""
    return reading > settings.threshold


def monotonic_ends(settings: PatchSettings, index: Tensor, reading: Tensor, before: Tensor) -> Tensor:
    """Where the next byte is harder to guess than this one was by more than the threshold; after byte 1 always."""
    return (index == 1) | (reading - before > settings.threshold)


def combined_ends(settings: PatchSettings, index: Tensor, reading: Tensor, before: Tensor) -> Tensor:
    """A rise above ``threshold_add`` to an entropy above ``threshold``.

    As in the paper's code, a patch ends after byte 1 always and after byte 2 never: its "the byte before starts no
    patch" is asked before any start but that forced one is known.
    """
    rises = (reading - before > settings.threshold_add) & (reading > settings.threshold)
    return (index == 1) | (index > 2) & rises


RULES: dict[str, Rule] = {
    "static": static_ends,
    "space": space_ends,
    "entropy": entropy_ends,
    "monotonic": monotonic_ends,
    "combined": combined_ends,
}


def patch_ends(
    settings: PatchSettings,
    index_BT: Tensor,
    reading_BT: Tensor,
    before_B: Tensor | None = None,
    open_B: Tensor | None = None,
) -> Tensor:
    """Whether a patch ends at each byte, (B, T).

    ``index_BT``: number of each byte in its document, from 0. ``before_B``: reading of the byte before the first
    column; ``open_B``: bytes of the unfinished patch before it. Both None at the start of a row.
    A patch longer than ``max_size`` is cut into pieces of that size and what remains.
    """
    if before_B is None:
        before_B = torch.zeros_like(reading_BT[:, 0])
    before_BT = torch.cat([before_B[:, None], reading_BT[:, :-1]], dim=1)
    ends_BT = (index_BT == 0) | RULES[settings.mode](settings, index_BT, reading_BT, before_BT)
    if settings.max_size:
        ends_BT = ends_BT | (_bytes_since_end(ends_BT, index_BT, open_B) % settings.max_size == 0)
    return ends_BT


def _bytes_since_end(ends_BT: Tensor, index_BT: Tensor, open_B: Tensor | None) -> Tensor:
    """Bytes from the last end, or the start of the document, up to each byte, itself counted; (B, T)."""
    column_T = torch.arange(ends_BT.shape[1], device=ends_BT.device).expand(ends_BT.shape)
    first_B = torch.full_like(column_T[:, 0], -1) if open_B is None else -1 - open_B
    last_end_BT = torch.cat([first_B[:, None], torch.where(ends_BT, column_T, -1 - (1 << 62))[:, :-1]], dim=1)
    document_BT = torch.where(index_BT == 0, column_T - 1, -1 - (1 << 62))
    return column_T - torch.maximum(last_end_BT, document_BT).cummax(dim=1).values


def mean_patch_size(settings: PatchSettings, index_BS: Tensor, reading_BS: Tensor) -> float:
    """Bytes per patch over a sample of rows."""
    return reading_BS.numel() / int(patch_ends(settings, index_BS, reading_BS).sum())


def threshold_for_size(settings: PatchSettings, index_BS: Tensor, entropy_BS: Tensor) -> float:
    """The ``threshold`` with which patches of a sample have ``size`` bytes on average, as nearly as can be.

    Raises ValueError where no threshold gives that size.
    """
    least, most = float(entropy_BS.min()), float(entropy_BS.max())
    low, high = least - most - 1.0, most + 1.0  # entropies and their rises lie between

    def size_at(threshold: float) -> float:
        return mean_patch_size(replace(settings, threshold=threshold), index_BS, entropy_BS)

    smallest, largest = size_at(low), size_at(high)
    if not smallest <= settings.size <= largest:
        raise ValueError(
            f"patches.size={settings.size} cannot be had by a threshold: patches.mode={settings.mode} gives "
            f"{smallest:.2f} to {largest:.2f} bytes per patch here; use a size between"
        )
    for _ in range(60):
        middle = (low + high) / 2
        if size_at(middle) < settings.size:
            low = middle
        else:
            high = middle
    return min(low, high, key=lambda threshold: abs(size_at(threshold) - settings.size))
