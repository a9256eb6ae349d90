"""Temperature scaling: one number that logits are divided by, so that confidence means what it says.

Answers stay as they are; only how sure they are changes (Guo et al. 2017, arXiv:1706.04599, section 4.2).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import scipy

LEAST, MOST = 0.05, 20.0


def fit_temperature(loss: Callable[[float], float]) -> float:
    """The temperature between LEAST and MOST at which ``loss`` (of held-out predictions, nats) is least.

    ``loss`` has one minimum: the negative log-likelihood is convex in 1 / temperature. Workers that share the
    predictions give the sum of all, and so find the same number. Raises ValueError for a loss that is not finite.
    """
    if not math.isfinite(first := loss(1.0)):
        raise ValueError(f"loss={first} at temperature 1 is not finite; look for NaN or infinity in the logits")
    bounds = math.log(LEAST), math.log(MOST)
    found = scipy.optimize.minimize_scalar(
        lambda log: loss(math.exp(log)), bounds=bounds, method="bounded", options={"xatol": 1e-6}
    )
    return math.exp(float(found.x))
