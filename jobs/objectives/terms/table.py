"""Every loss that a recipe may weigh, by its name in ``objectives.weights`` and ``loss_weights``."""

from __future__ import annotations

from collections.abc import Mapping

from jobs.objectives.terms.calibration import Calibration
from jobs.objectives.terms.compute import Compute
from jobs.objectives.terms.safety import Safety
from jobs.objectives.terms.term import Term

MAIN = "language_model"

# What a language model's output has among its ``parts``, with the field of the model's config that weighs it where no
# recipe does; None: it weighs 1.
PARTS: Mapping[str, str | None] = {
    MAIN: None,
    "router_balance": "router_aux_loss_coef",
    "router_z": "router_z_loss_coef",
}

# Computed beside it.
TERMS: Mapping[str, type[Term]] = {"calibration": Calibration, "compute": Compute, "safety": Safety}

# Names that are kept for terms whose data and heads there are not yet.
LATER = ("contrastive", "discrepancy", "diffusion", "reward")
