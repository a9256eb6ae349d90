"""Which parameters the optimizer decays."""

from __future__ import annotations

from typing import Any

from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; vectors (norms, biases) do not, as everywhere since GPT-2.

    Nor does a parameter that carries ``_no_weight_decay``, as the decay rates of state spaces do (Mamba's convention).
    Parameters without gradient are left out.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    decays = [p.dim() >= 2 and not getattr(p, "_no_weight_decay", False) for p in trained]
    groups = [
        {
            "name": "matrices",
            "params": [p for p, d in zip(trained, decays, strict=True) if d],
            "weight_decay": weight_decay,
        },
        {"name": "vectors", "params": [p for p, d in zip(trained, decays, strict=True) if not d], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
