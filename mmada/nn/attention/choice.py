"""Which kernel computes attention, by what was asked for and what the model needs. Imports no torch.

``attend`` departs from it twice, where another does the same cheaper: a bias at all scores of a long row goes
``blockwise`` instead of ``sdpa``, and the tiles of block-sparse layers go through ``sdpa`` (with a cap ``eager``)
instead of ``blockwise``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmada.config import MMaDAConfig

# What each kernel can do beside softmax(q kᵀ + mask) v. "eager" is the plain reference and gives the weights.
ABILITIES: dict[str, set[str]] = {
    "eager": {"soft cap", "sparsemax", "dropout"},
    "sdpa": {"dropout"},
    "blockwise": {"soft cap"},
    "flex_attention": {"soft cap"},
}
# Of a kernel that somebody else registered with transformers: what its interface promises.
OTHERS = {"soft cap", "dropout"}
# "sdpa" is what a model gets when nobody chooses, so it hands on what it cannot do; who names another means it.
STAND_INS = {"sdpa": ("blockwise", "eager")}
FIELDS = {"soft cap": "attn_logit_softcapping", "sparsemax": "attention_normalizer", "dropout": "attention_dropout"}


def needs(config: MMaDAConfig, training: bool) -> set[str]:
    """What the model asks of a kernel."""
    asked = {
        "soft cap": config.attn_logit_softcapping is not None,
        "sparsemax": config.attention_normalizer == "sparsemax",
        "dropout": training and config.attention_dropout > 0,
    }
    return {name for name, wanted in asked.items() if wanted}


def choose_kernel(config: MMaDAConfig, training: bool) -> str:
    """The kernel that goes over the scores: the one asked for, or its first stand-in that can do all that is needed.

    Raises ValueError naming the field that none of them can do.
    """
    asked = config._attn_implementation or "sdpa"
    needed = needs(config, training)
    for name in (asked, *STAND_INS.get(asked, ())):
        if needed <= ABILITIES.get(name, OTHERS):
            return name
    field = FIELDS[min(needed - ABILITIES.get(asked, OTHERS))]
    raise ValueError(
        f"{field}={getattr(config, field)} is beyond attn_implementation={asked}; use sdpa, which hands on what it "
        "cannot do, or eager"
    )
