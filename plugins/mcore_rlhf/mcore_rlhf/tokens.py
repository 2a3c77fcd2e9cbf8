"""Metrics of the tokens of answers, named and computed as TRL does: means over tokens.

K tokens with a weight.
"""

import torch
from torch import Tensor

from mcore_core.protocols import HeadOut, HeadSpec

HEAD = HeadSpec(entropy=True, summary=True)
"""What these metrics need."""


def token_metrics(
    out: HeadOut, chosen_K: Tensor, *, accuracy: bool = False
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return shares of entropy, logits/chosen, logits/rejected and mean_token_accuracy.

    entropy is over all tokens; logits/* are over the tokens of either kind of answer, of each
    token's mean logit over the vocabulary.

    Args:
        out: What `HEAD` gives.
        chosen_K: True where the token's answer is chosen, or desirable.
        accuracy: Also say in how many tokens of chosen answers no token was likelier.
    """
    assert out.entropy_T is not None, "the head gives entropies"
    assert out.mean_logit_T is not None, "the head gives the summary"
    assert out.top_T is not None, "the head gives the summary"
    everything_K = torch.ones_like(chosen_K)
    named = {
        "entropy": (out.entropy_T, everything_K),
        "logits/chosen": (out.mean_logit_T, chosen_K),
        "logits/rejected": (out.mean_logit_T, ~chosen_K),
    }
    if accuracy:
        named["mean_token_accuracy"] = (out.top_T, chosen_K)
    return {
        name: ((values_K * counted_K).sum(dtype=torch.float64), counted_K.sum(dtype=torch.float64))
        for name, (values_K, counted_K) in named.items()
    }
