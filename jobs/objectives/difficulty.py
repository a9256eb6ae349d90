"""How hard each row of a source is: the level of its task, its length, how badly it compresses, its loss.

# N rows
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from jobs.checkpoint_folder import model_folder
from jobs.objectives.objective import Rows
from mmada.data import IGNORE_INDEX
from mmada.data.mixing import difficulty_shares

if TYPE_CHECKING:
    from jobs.objectives.tasks import TaskObjective
    from jobs.objectives.text import TextObjective
    from jobs.recipe_schema_stages import SourceSection

_ROWS_AT_ONCE = 32


def shares_of_rows(
    section: SourceSection, objective: TextObjective | TaskObjective, rows: Rows, length: int
) -> np.ndarray | None:
    """The rows' difficulties as shares, (N,); None where the source has no rule. A function of recipe and data."""
    if section.difficulty is None:
        return None
    if section.difficulty == "level":
        difficulty_N = np.array([item.level for item in objective.tasks.train], dtype=np.float64)  # type: ignore[union-attr]
    elif section.difficulty == "length":
        difficulty_N = _over_rows(rows, lambda batch: (batch["shift_labels"] != IGNORE_INDEX).sum(1).double())
    elif section.difficulty == "compression":
        difficulty_N = _over_rows(rows, _compressed)
    else:
        assert section.difficulty_model is not None
        difficulty_N = _losses(rows, model_folder(section.difficulty_model))
    return difficulty_shares(difficulty_N)


def _over_rows(rows: Rows, measure: object) -> np.ndarray:
    parts = []
    for first in range(0, len(rows), _ROWS_AT_ONCE):
        batch = rows.batch(np.arange(first, min(first + _ROWS_AT_ONCE, len(rows))))
        parts.append(measure(batch).numpy())  # type: ignore[operator]
    return np.concatenate(parts)


def _compressed(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Bytes of each row's ids after zlib over those before; the ids take two bytes each."""
    ratios = []
    for ids, labels in zip(batch["input_ids"].numpy(), batch["shift_labels"].numpy(), strict=True):
        content = ids[: max(1, int((labels != IGNORE_INDEX).nonzero()[0].max(initial=0)) + 1)].astype("<u4").tobytes()
        ratios.append(len(zlib.compress(content, 9)) / len(content))
    return torch.tensor(ratios, dtype=torch.float64)


@torch.no_grad()
def _losses(rows: Rows, folder: Path) -> np.ndarray:
    """Mean loss of each row under a small trained model, nats per target."""
    from mmada.model import MMaDAForCausalLM

    model = MMaDAForCausalLM.from_pretrained(folder).eval()

    def measure(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        labels_BT = batch.pop("shift_labels")
        logits_BTV = model(**batch, use_cache=False).logits.float()
        losses_BT = torch.nn.functional.cross_entropy(
            logits_BTV.flatten(0, 1), labels_BT.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
        ).view_as(labels_BT)
        return (losses_BT.sum(1) / (labels_BT != IGNORE_INDEX).sum(1).clamp(min=1)).double()

    return _over_rows(rows, measure)
