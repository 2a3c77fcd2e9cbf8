"""Labels of rows as numbers."""

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from mcore_core.data.rows import RowError
from mcore_core.errors import UsageError, usage_error
from mcore_core.protocols import Row

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mcore_sft.tasks.config import ProblemType


def labels(row: Row, problem: "ProblemType", num_labels: int) -> "NDArray[np.float64]":
    """Return a row's label as an array of always the same length.

    Args:
        row: Its `label`, or `labels`, is read.
        problem: What the label is.
        num_labels: How many there are.

    Returns:
        regression: the numbers, [num_labels]. single_label_classification: the class, [1].
        multi_label_classification: 1 for each label that holds, else 0, [num_labels].

    Raises:
        RowError: The row has no label, or one of another kind.
        UsageError: It lies outside of num_labels: leaving such rows out would leave out a class.
    """
    value = row.get("label", row.get("labels"))
    if value is None:
        raise RowError("there is no 'label'")
    many = list(value) if isinstance(value, list | tuple) else [value]
    match problem:
        case "regression":
            if len(many) != num_labels:
                raise _unlike(value, f"--num_labels {num_labels} needs {num_labels} numbers")
            return np.array([number(one) for one in many], np.float64)
        case "single_label_classification":
            if len(many) != 1:
                raise RowError(f"'label' must be one class, found {value!r}")
            return np.array([_class(many[0], num_labels)], np.float64)
        case _:
            if not isinstance(value, list | tuple):
                raise RowError(f"'label' must be a list of the labels that hold, found {value!r}")
            held = np.zeros(num_labels, np.float64)
            held[[_class(one, num_labels) for one in many]] = 1.0
            return held


def number(value: Any) -> float:  # noqa: ANN401
    """Return a finite number. Raises RowError for anything else."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise RowError(f"'label' must be a finite number, found {value!r}")
    return float(value)


def _class(value: Any, num_labels: int) -> int:  # noqa: ANN401
    if not isinstance(value, int) and not (isinstance(value, float) and value.is_integer()):
        raise RowError(f"'label' must be the number of a class, found {value!r}")
    if not 0 <= value < num_labels:
        raise _unlike(value, f"--num_labels {num_labels} has classes 0 to {num_labels - 1}")
    return int(value)


def _unlike(value: Any, fact: str) -> UsageError:  # noqa: ANN401
    return usage_error(
        "MC382",
        f"the label {value!r} of a row does not fit: {fact}",
        "fix: correct --num_labels, or the data",
    )
