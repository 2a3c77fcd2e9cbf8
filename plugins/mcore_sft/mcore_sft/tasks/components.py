"""Which tasks there are, and the losses of those that have several."""

from typing import Any

from mcore_core.component import Component

CAUSAL_LM = "causal_lm"
TASKS: tuple[Component[Any], ...] = (
    Component("seq_cls", "mcore_sft.tasks.seq_cls:SequenceClassification", "labels for texts"),
    Component("embedding", "mcore_sft.tasks.embedding:Embedding", "vectors for texts"),
    Component(
        "generative_reranker",
        "mcore_sft.tasks.reranker:GenerativeReranker",
        "yes or no to a query and a document",
    ),
)
_EMBEDDING = {
    "infonce": "a query's positive among other documents",
    "cosine_similarity": "the squared error of the cosine similarity",
    "contrastive": "like texts attract, unlike ones repel up to a margin",
    "online_contrastive": "the same for the pairs of a micro-batch that are hard",
}
_RERANKER = {
    "pointwise_reranker": "cross-entropy of yes and no, for each document",
    "listwise_reranker": "cross-entropy over a positive and the negatives of its query",
}
LOSSES: tuple[Component[Any], ...] = (
    *(
        Component(n, f"mcore_sft.tasks.embedding_loss:{n}", text, recipe="embedding")
        for n, text in _EMBEDDING.items()
    ),
    *(
        Component(n, f"mcore_sft.tasks.reranker_loss:{n}", text, recipe="generative_reranker")
        for n, text in _RERANKER.items()
    ),
)
FIRST_LOSS = {"embedding": "infonce", "generative_reranker": "pointwise_reranker"}
LABELLED = frozenset({"cosine_similarity", "contrastive", "online_contrastive"})
"""Losses of embeddings whose rows have labels."""


def named(name: str) -> Component[Any]:
    """Return the recipe of a task, of this package or of another plugin.

    Raises:
        UsageError: There is no such task.
    """
    for task in TASKS:
        if task.name == name:
            return task
    from mcore_core.manager import PluginManager  # noqa: PLC0415  (seldom needed)

    manager = PluginManager()
    manager.load_installed()
    return manager.catalogue("mcore_tasks").find(name, "--task_type")
