"""Scores of texts by reasoning-gym's scorers, none of which may run what a model wrote.

Some of these scorers hand the text to ``eval``, or to sympy's parser, which does the same. A policy that is rewarded
for what it writes must not reach them with anything but the literals and formulas that their families ask for.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable
from typing import Any

MAX_DEGREE = 100  # of a formula's powers, one inside another multiplied

# Numbers and the four operations; no powers, which a few characters can make too long to compute.
_ARITHMETIC = re.compile(r"(?:[\s\d+\-/().]|(?<!\*)\*(?!\*))*")
# Polynomials and elementary functions; a dot only before a digit, so that no attribute can be asked for.
_FORMULA = re.compile(
    r"(?:[\s\d+\-*/()]|\.(?=\d)|\b(?:sin|cos|tan|asin|acos|atan|sinh|cosh|tanh|exp|log|ln|sqrt|pi|[A-Za-z])\b)*"
)


def is_literal(text: str, entry: dict[str, Any]) -> bool:
    """Whether evaluating ``text`` can do no more than make a list of words and numbers.

    What is no expression is not evaluated. A name is one, and scorers have names for the right answer: it counts only
    where it is a right answer itself, letter by letter.
    """
    try:
        ast.literal_eval(text)
        return True
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        pass
    try:
        ast.parse(text.lstrip(" \t"), mode="eval")
    except (SyntaxError, ValueError):
        return True
    except (MemoryError, RecursionError):
        return False
    return text in (entry["answer"], *entry.get("metadata", {}).get("valid_answers", ()))


def is_arithmetic(text: str, entry: dict[str, Any]) -> bool:
    """Whether ``text`` holds numbers and the four operations alone."""
    return _ARITHMETIC.fullmatch(text) is not None


def is_formula(text: str, entry: dict[str, Any]) -> bool:
    """Whether ``text`` is a formula whose powers are small enough to be computed."""
    if not _FORMULA.fullmatch(text):
        return False
    try:
        return _degree(ast.parse(text.strip(), mode="eval").body) <= MAX_DEGREE
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False


def _degree(node: ast.AST) -> float:
    """How high the powers in a formula reach; infinite for an exponent that is no number."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        return _degree(node.left) * max(1.0, abs(_number(node.right)))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult | ast.Div):
        return _degree(node.left) + _degree(node.right)
    return max([1.0, *map(_degree, ast.iter_child_nodes(node))])


def _number(node: ast.AST) -> float:
    """The value of an exponent such as 2, -1 or 3/2."""
    match node:
        case ast.Constant(value=int() | float() as value):
            return float(value)
        case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=operand):
            return _number(operand)
        case ast.BinOp(left=left, op=ast.Div(), right=right) if _number(right):
            return _number(left) / _number(right)
    return math.inf


# family -> whether a text may be evaluated as an answer to an entry
_EVALUATED: dict[str, Callable[[str, dict[str, Any]], bool]] = {
    "binary_matrix": is_literal,
    "n_queens": is_literal,
    "spiral_matrix": is_literal,
    "string_insertion": is_literal,
    "countdown": is_arithmetic,
    "puzzle24": is_arithmetic,
    "intermediate_integration": is_formula,
    "simple_integration": is_formula,
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
    if allowed is not None and not allowed(answer, entry):
        answer = ""
    score = float(dataset.score_answer(answer, entry))
    if not (math.isfinite(score) and 0 <= score <= 1):
        raise ValueError(f"the scorer of {family} gave {score}; a score lies between 0 and 1")
    return score
