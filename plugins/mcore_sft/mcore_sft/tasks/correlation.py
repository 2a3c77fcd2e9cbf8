"""How well predictions follow labels. R rows."""

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def pearson(a_R: "NDArray[Any]", b_R: "NDArray[Any]") -> float:
    """Return Pearson's correlation coefficient; nan where either is constant."""
    a_R, b_R = a_R - a_R.mean(), b_R - b_R.mean()
    scale = np.sqrt((a_R**2).sum() * (b_R**2).sum())
    return float((a_R * b_R).sum() / scale) if scale > 0 else float("nan")


def spearman(a_R: "NDArray[Any]", b_R: "NDArray[Any]") -> float:
    """Return Spearman's rank correlation coefficient: equal values share their mean rank."""
    return pearson(_ranks(a_R), _ranks(b_R))


def _ranks(values_R: "NDArray[Any]") -> "NDArray[np.float64]":
    _, which_R, counts = np.unique(values_R, return_inverse=True, return_counts=True)
    ranks: NDArray[np.float64] = (np.cumsum(counts) - (counts - 1) / 2)[which_R]
    return ranks
