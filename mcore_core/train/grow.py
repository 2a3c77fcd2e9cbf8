"""Weights of a model whose vocabulary grows: those in files, then rows for the new tokens.

A new token starts as the mean of the rows that the model has: it is then about as likely as the
average token, and the others lose at most a share of 1 / vocabulary to it, where random rows may
take most of the probability (Hewitt, Initializing New Word Embeddings for Pretrained Language
Models, 2021). All new tokens start alike; their contexts tell them apart. A mean, unlike a draw,
is the same for every layout.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from mcore_core.errors import usage_error
from mcore_core.model.names import EMBEDDING, named_weights
from mcore_core.parallel.reduce import any_rank

if TYPE_CHECKING:
    from mcore_core.data.new_tokens import Growth
    from mcore_core.train.plan import ModelSource

VOCABULARY = (EMBEDDING, "output_layer.weight")
"""Weights with a row for each token."""


def load_weights(chunks: Sequence[Any], source: "ModelSource", bridge_class: Any) -> None:  # noqa: ANN401
    """Fill the model from the source's files, and rows of new tokens; collective."""
    bridge_class(source.family, source.in_files).load(chunks, source.path)
    if source.growth is not None:
        fill_rows(chunks, source.growth)


def check_new_rows(chunks: Sequence[Any], source: "ModelSource", device: torch.device) -> None:
    """Raise UsageError where new tokens have rows that do not train; collective.

    Args:
        chunks: The model, its tuner applied.
        source: What it is built from.
        device: Of this rank.
    """
    if source.growth is None:
        return
    frozen = [n for n in VOCABULARY if not _trains(named_weights(chunks).get(n))]
    if any_rank(bool(frozen), device):
        tied = source.architecture.tie_word_embeddings
        raise usage_error(
            "MC434",
            "--new_special_tokens adds rows to the embedding and the output layer, which do not "
            "train in this run",
            "with LoRA they are one weight in this model, which PEFT would train as two"
            if tied
            else "the new tokens would stay the mean of the others",
            "fix: --tuner_type full, with the embedding among what trains"
            if tied
            else "fix: --modules_to_save embed_tokens lm_head with LoRA, or --trainable_parameters "
            "where parts of the model are frozen",
        )


def _trains(weight: torch.Tensor | None) -> bool:
    return weight is None or weight.requires_grad


@torch.no_grad()
def fill_rows(chunks: Sequence[Any], growth: "Growth") -> None:
    """Set the rows of new tokens to the mean of those of known ones; collective."""
    group = parallel_state.get_tensor_model_parallel_group()
    for name, weight in named_weights(chunks).items():
        if name not in VOCABULARY:
            continue
        rows = len(weight)
        ids_V = torch.arange(rows, device=weight.device) + group.rank() * rows
        mean_H = weight[ids_V < growth.known].sum(0, dtype=torch.float64)
        dist.all_reduce(mean_H, group=group)
        new_V = (ids_V >= growth.first) & (ids_V < growth.end)
        weight[new_V] = (mean_H / growth.known).to(weight.dtype)
