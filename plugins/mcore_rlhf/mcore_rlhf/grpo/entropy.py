"""Train only the tokens where the policy was least sure (arXiv 2506.01939). L tokens of a unit."""

from collections.abc import Sequence

import numpy as np

from mcore_core.protocols import Unit

EQUAL = 1e-5
"""Entropies this close, in nats, count as equal. Completions of a prompt all have the same entropy
at their first token, but for rounding, and rounding must not choose among them."""


def keep_highest(units: Sequence[Unit], share: float) -> None:
    """Set `policy` to 0 on all but the tokens with the highest entropy of a global batch.

    Args:
        units: The completions of an optimizer step, with `entropy` and `trains`, both [L].
        share: The part of the tokens that is kept; those at the quantile itself, or
            within `EQUAL` of it, are kept too.
    """
    kept = [unit["trains"] & bool(unit["kept"]) for unit in units]
    values = np.concatenate([u["entropy"][k] for u, k in zip(units, kept, strict=True)])
    if not len(values):
        return
    least = np.quantile(values.astype(np.float64), 1 - share) - EQUAL
    for unit in units:
        policy = unit.get("policy")
        ones = np.ones(len(unit["trains"]), np.float32) if policy is None else policy
        high = unit["entropy"].astype(np.float64) >= least
        unit["policy"] = np.where(high | ~unit["trains"], ones, np.float32(0))
