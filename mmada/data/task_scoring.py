"""Scores of texts by reasoning-gym's scorers, none of which may run what a model wrote.

Some of these scorers hand the text to ``eval``, or to sympy's parser, which does the same. A policy that is rewarded
for what it writes must not reach them with anything but the literals and formulas that their families ask for.
"""

from __future__ import annotations

import math
import re
from typing import Any

# Without parentheses, dots and operators nothing can be called or grow: lists of words and numbers.
_LITERAL = re.compile(r"[\w\s\[\],'\"-]*")
# Numbers and the four operations; no powers, which a few characters can make too long to compute.
_ARITHMETIC = re.compile(r"(?:[\s\d+\-/().]|(?<!\*)\*(?!\*))*")
# Polynomials and elementary functions; a dot only before a digit, so that no attribute can be asked for.
_FORMULA = re.compile(
    r"(?:[\s\d+\-*/()]|\.(?=\d)|\b(?:sin|cos|tan|asin|acos|atan|sinh|cosh|tanh|exp|log|ln|sqrt|pi|[A-Za-z])\b)*"
)

# family -> what a text may consist of to be evaluated
_EVALUATED = {
    "binary_matrix": _LITERAL,
    "n_queens": _LITERAL,
    "spiral_matrix": _LITERAL,
    "string_insertion": _LITERAL,
    "countdown": _ARITHMETIC,
    "puzzle24": _ARITHMETIC,
    "intermediate_integration": _FORMULA,
    "simple_integration": _FORMULA,
}


def score_text(dataset: Any, family: str, entry: dict[str, Any], text: str) -> float:
    """The score of ``text``, stripped of surrounding white space, as answer to ``entry``: a float, 0 to 1.

    In families whose scorer evaluates texts, one that holds more than an answer can counts as the empty text.

    Raises:
        Exception: whatever the family's scorer raises.
        ValueError: its score is no number between 0 and 1.
    """
    answer = text.strip()
    allowed = _EVALUATED.get(family)
    if allowed is not None and not allowed.fullmatch(answer):
        answer = ""
    score = float(dataset.score_answer(answer, entry))
    if not (math.isfinite(score) and 0 <= score <= 1):
        raise ValueError(f"the scorer of {family} gave {score}; a score lies between 0 and 1")
    return score
