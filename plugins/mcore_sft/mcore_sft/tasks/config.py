"""Options of the tasks."""

from typing import ClassVar, Literal

from pydantic import Field

from mcore_core.config.group import ConfigGroup

type ProblemType = Literal[
    "regression", "single_label_classification", "multi_label_classification"
]


class TaskConfig(ConfigGroup):
    """What the model learns to give: text, labels, embeddings, or yes and no."""

    title: ClassVar[str] = "Task"

    task_type: str = "causal_lm"
    """causal_lm predicts tokens, seq_cls labels a text, embedding turns a text into a vector,
    generative_reranker says yes or no to a query and a document."""
    num_labels: int | None = Field(None, ge=1)
    """Labels of seq_cls: classes, or numbers to predict."""
    problem_type: ProblemType | None = None
    """What the labels of seq_cls are. none: regression with one label, else single_label."""
    loss_type: str | None = None
    """The loss of embedding (infonce, cosine_similarity, contrastive, online_contrastive) or of
    generative_reranker (pointwise_reranker, listwise_reranker), or ./FILE.py:FUNCTION. none: the
    first of them."""

    @property
    def problem(self) -> ProblemType:
        """What the labels are, decided."""
        if self.problem_type is not None:
            return self.problem_type
        return "regression" if self.num_labels == 1 else "single_label_classification"


class EmbeddingConfig(ConfigGroup):
    """Embeddings."""

    title: ClassVar[str] = "Embedding"

    infonce_temperature: float = Field(0.1, gt=0)
    """Divides the cosine similarities."""
    infonce_use_batch: bool = True
    """Compare a query with the documents of all queries of its micro-batch, those of the other
    data-parallel ranks included; false: with its own positive and negatives alone."""
    infonce_hard_negatives: int | None = Field(None, ge=1)
    """Take so many negatives of each row: the first ones, or some more than once. none: all."""
    infonce_mask_fake_negative: bool = False
    """Leave out what is more similar than the positive is, plus infonce_fake_neg_margin: it is
    probably no negative."""
    infonce_fake_neg_margin: float = 0.1
    """See infonce_mask_fake_negative."""
    infonce_include_qq: bool = False
    """Compare a query with the other queries of the micro-batch too."""
    infonce_include_dd: bool = False
    """Compare a query's positive with the other documents of the micro-batch too."""
    contrastive_margin: float = Field(0.5, ge=0)
    """The cosine distance beyond which unlike texts no longer push each other away."""
    mrl_dims: list[int] | None = None
    """Matryoshka embeddings: add up the loss of the first so many numbers of each embedding, for
    example 1024 256 64. none: the whole embedding alone."""
    mrl_weights: list[float] | None = None
    """What the loss of each of mrl_dims is multiplied by. none: 1 each."""


class RerankerConfig(ConfigGroup):
    """Rerankers that answer yes or no."""

    title: ClassVar[str] = "Reranker"

    reranker_positive_token: str = "yes"
    """What the model answers where a document suits the query; one token."""
    reranker_negative_token: str = "no"
    """What it answers where not; one token."""
    reranker_instruction: str = (
        "Given a web search query, retrieve relevant passages that answer the query"
    )
    """What suits; a row's system message takes its place."""
    max_positive_samples: int = Field(1, ge=1)
    """Take so many positive documents of each row at most, at random."""
    max_negative_samples: int = Field(7, ge=1)
    """Take so many negative documents of each row at most, at random."""
    listwise_reranker_temperature: float = Field(1.0, gt=0)
    """Divides the differences of the logits of both tokens."""
    listwise_reranker_min_group_size: int = Field(2, ge=2)
    """A positive document with fewer documents to choose from, itself included, does not train."""
