"""Losses of labelled texts: pure functions of scores, one value a text. S texts, N labels."""

from typing import TYPE_CHECKING, assert_never

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from mcore_sft.tasks.config import ProblemType


def loss(scores_SN: Tensor, labels_SN: Tensor, problem: "ProblemType") -> Tensor:
    """Return the loss of each text, [S]; its mean is the loss of transformers' classifiers.

    regression is the squared error, a mean over the labels; single_label_classification the
    cross-entropy in nats; multi_label_classification the binary cross-entropy, a mean over labels.

    Args:
        scores_SN: What the head gives.
        labels_SN: Numbers, the class ([S, 1]), or 1 for each label that holds.
        problem: What the labels are.
    """
    match problem:
        case "regression":
            return ((scores_SN - labels_SN) ** 2).mean(-1)
        case "single_label_classification":
            return F.cross_entropy(scores_SN, labels_SN.squeeze(-1).long(), reduction="none")
        case "multi_label_classification":
            each_SN = F.binary_cross_entropy_with_logits(scores_SN, labels_SN, reduction="none")
            return each_SN.mean(-1)
        case _:
            assert_never(problem)


def measures(scores_SN: Tensor, labels_SN: Tensor, problem: "ProblemType") -> dict[str, Tensor]:
    """Return what is reported of each text, [S] each.

    accuracy: the most likely class is right, or every label is; label_accuracy: the share of the
    labels that are; mae: the mean absolute error.
    """
    match problem:
        case "regression":
            return {"mae": (scores_SN - labels_SN).abs().mean(-1)}
        case "single_label_classification":
            return {"accuracy": (scores_SN.argmax(-1) == labels_SN.squeeze(-1)).double()}
        case "multi_label_classification":
            right_SN = (scores_SN > 0) == (labels_SN > 0)
            return {
                "accuracy": right_SN.all(-1).double(),
                "label_accuracy": right_SN.double().mean(-1),
            }
        case _:
            assert_never(problem)


def rows(scores_SN: Tensor, labels_SN: Tensor) -> Tensor:
    """Return predictions and labels side by side, [S, 2 N]."""
    return torch.cat([scores_SN, labels_SN], -1).detach()
