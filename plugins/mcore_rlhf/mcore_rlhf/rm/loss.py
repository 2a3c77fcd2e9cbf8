"""The loss of reward models: a pure function of scores, one value a pair. P pairs."""

import torch.nn.functional as F
from torch import Tensor


def pair_loss(
    chosen_P: Tensor, rejected_P: Tensor, *, margin_P: Tensor, center: float | None
) -> Tensor:
    """Return -l(r_c - r_r - margin) + center (r_c + r_r)^2, l = log sigmoid.

    Bradley-Terry with a margin (Touvron et al. 2023, Llama 2), and a term that keeps scores around
    0 (Eisenstein et al. 2023, Helping or Herding).

    Args:
        chosen_P: Scores of the chosen answers.
        rejected_P: Scores of the rejected answers.
        margin_P: By how much the chosen answer is better.
        center: Weight of the second term; None leaves it out.
    """
    loss_P = -F.logsigmoid(chosen_P - rejected_P - margin_P)
    return loss_P if center is None else loss_P + center * (chosen_P + rejected_P) ** 2
