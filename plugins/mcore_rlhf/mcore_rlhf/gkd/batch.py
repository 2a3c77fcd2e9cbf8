"""A micro-batch of distillation, and its units."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mcore_core.data.collate import pack_sequences
from mcore_core.protocols import Batch, Unit


@dataclass(frozen=True, slots=True, kw_only=True)
class GKDBatch(Batch):
    """Answers with their prompts; what has a weight is compared with the teacher."""

    nll_T: Tensor
    """How much the negative log-likelihood of each target counts, float32: sft_alpha times its
    weight where the answer is the dataset's, else 0."""


def answered(unit: Unit, answer: Sequence[int]) -> Unit:
    """Return a unit of its prompt and an answer that was generated."""
    prompt = np.asarray(unit["prompt_ids"], np.int32)
    ids = np.concatenate((prompt, np.asarray(answer, np.int32)))
    weights = np.zeros(len(ids), np.float32)
    weights[len(prompt) :] = 1.0
    return {"input_ids": ids, "weights": weights, "length": len(ids), "generated": True}


def collate(units: Sequence[Unit], *, sft_alpha: float) -> GKDBatch:
    """Pack units, in order."""
    sequences = [(np.asarray(u["input_ids"]), np.asarray(u["weights"], np.float32)) for u in units]
    fields = pack_sequences(sequences)
    alphas = [0.0 if u.get("generated") else sft_alpha for u in units]
    alpha_T = np.repeat(np.asarray(alphas, np.float32), fields["lengths"])
    return GKDBatch(**fields, nll_T=fields["weights_T"] * torch.from_numpy(alpha_T))
