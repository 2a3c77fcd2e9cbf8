"""Compare what two runs gave: losses, norms, metrics, gradients and weights."""

import math
from typing import TYPE_CHECKING

from torch import Tensor

from mcore_core.testing.parity import is_vocabulary, largest_difference

if TYPE_CHECKING:
    from mcore_core.testing.cases import Outcome


def assert_same(
    run: "Outcome", reference: "Outcome", *, relative: float = 1e-5, absolute: float = 0.0
) -> None:
    """Compare every step's loss, norm, metrics and gradients, and the final weights.

    Numbers are compared relatively, or absolutely where that is wider (for what is a difference of
    large numbers, as a reward is); a gradient or weight by its largest difference over the largest
    value of its tensor. Gradients are left out where `run` kept none.

    Raises:
        AssertionError: It names the step and what differs by how much.
    """
    assert len(run.results) == len(reference.results)
    for step, (a, b) in enumerate(zip(run.results, reference.results, strict=True), start=1):
        assert (a.tokens, a.lr) == (b.tokens, b.lr), f"step {step}: {a} against {b}"
        assert a.metrics.keys() == b.metrics.keys(), f"step {step}: {a} against {b}"
        pairs = {
            "loss": (a.loss, b.loss),
            "grad_norm": (a.grad_norm, b.grad_norm),
            **{name: (a.metrics[name], b.metrics[name]) for name in a.metrics},
        }
        for name, (x, y) in pairs.items():
            assert math.isclose(x, y, rel_tol=relative, abs_tol=absolute), (
                f"step {step}: {name} is {x}, expected {y} within {relative} of it"
            )
    if run.gradients:
        both = zip(run.gradients, reference.gradients, strict=True)
        for step, (mine, expected) in enumerate(both, start=1):
            worst, key = largest_difference(mine, expected)
            assert worst <= relative, f"step {step}: the gradient of {key} differs by {worst:.2e}"
    weights = _common_rows(run.weights, reference.weights)
    worst, key = largest_difference(weights, _common_rows(reference.weights, weights))
    assert worst <= relative, f"after the last step the weight {key} differs by {worst:.2e}"


def _common_rows(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return `a` without the rows that pad its vocabulary beyond b's."""
    return {k: x[: len(b[k])] if k in b and is_vocabulary(k) else x for k, x in a.items()}
