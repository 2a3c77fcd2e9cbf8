"""Contradictions between the task and other options, seen without torch."""

from collections.abc import Iterator
from typing import Any

from mcore_core.config.compose import RunConfig
from mcore_core.config.decode import as_typed
from mcore_core.errors import Problem
from mcore_sft.tasks.components import CAUSAL_LM, TASKS
from mcore_sft.tasks.config import EmbeddingConfig, RerankerConfig, TaskConfig

KNOWN = {CAUSAL_LM, *(task.name for task in TASKS)}
TOKENS = (
    "calculate_per_token_loss",
    "enable_dft_loss",
    "enable_channel_loss",
    "loss_scale",
    "cross_entropy_loss_fusion",
    "mtp_num_layers",
    "mtp_loss_scaling_factor",
)
"""Options of losses over tokens."""
OWNERS = {
    "num_labels": ("seq_cls",),
    "problem_type": ("seq_cls",),
    "loss_type": ("embedding", "generative_reranker"),
    **dict.fromkeys(EmbeddingConfig.model_fields, ("embedding",)),
    **dict.fromkeys(RerankerConfig.model_fields, ("generative_reranker",)),
}
LOSS_OF = {"contrastive_margin": "contrastive", "infonce": "infonce", "listwise": "listwise"}
"""The start of an option of one loss -> what the names of such losses hold."""


def check(config: RunConfig) -> Iterator[Problem]:
    """Yield every contradiction."""
    task = config[TaskConfig]
    if task.task_type not in KNOWN:  # another plugin's task knows its options
        return
    changed = [name for name in (*OWNERS, *TOKENS) if name in config.names and config.changed(name)]
    for name in changed:
        owners = OWNERS.get(name, (CAUSAL_LM,))
        if task.task_type not in owners:
            yield _idle(config, name, f"--task_type {' or '.join(owners)}")
    match task.task_type:
        case "seq_cls":
            yield from _seq_cls(task)
        case "embedding":
            yield from _one_loss(config, task.loss_type or "infonce", changed)
            yield from _dims(config[EmbeddingConfig])
            yield from _negatives(config[EmbeddingConfig])
        case "generative_reranker":
            yield from _one_loss(config, task.loss_type or "pointwise_reranker", changed)
            yield from _tokens(config[RerankerConfig])


def _idle(config: RunConfig, name: str, needed: str) -> Problem:
    return Problem(
        "MC321",
        f"--{name} {as_typed(config.get(name))} does nothing without {needed}",
        [f"fix: add {needed}, or leave it out"],
    )


def _seq_cls(task: TaskConfig) -> Iterator[Problem]:
    if task.num_labels is None:
        yield Problem(
            "MC380",
            "--task_type seq_cls needs to know how many labels there are",
            ["fix: --num_labels 2, or as many as the data has"],
        )
    elif task.num_labels == 1 and task.problem_type == "single_label_classification":
        yield Problem(
            "MC320",
            "--num_labels 1 is a single class, which every text has",
            ["fix: --num_labels 2 or more, or --problem_type regression"],
        )


def _one_loss(config: RunConfig, loss: str, changed: list[str]) -> Iterator[Problem]:
    if "," in loss:
        yield Problem(
            "MC302", f"--loss_type {loss}: a task has one loss", ["fix: keep one of them"]
        )
    if ":" in loss:
        return
    for name in changed:
        for start, part in LOSS_OF.items():
            if name.startswith(start) and part not in loss:
                yield _idle(config, name, f"a --loss_type with {part}")


def _dims(options: EmbeddingConfig) -> Iterator[Problem]:
    dims, weights = options.mrl_dims, options.mrl_weights
    if dims is not None and (not dims or min(dims) < 1 or len(set(dims)) < len(dims)):
        yield Problem(
            "MC302",
            f"--mrl_dims {as_typed(dims)}: the sizes must differ and be at least 1",
            ["fix: for example --mrl_dims 1024 256 64"],
        )
    if weights is not None and len(weights) != len(dims or ()):
        yield Problem(
            "MC320",
            f"--mrl_weights has {len(weights)} numbers, --mrl_dims {len(dims or ())}",
            ["fix: give one weight for each size, in the same order"],
        )


def _negatives(options: EmbeddingConfig) -> Iterator[Problem]:
    if options.infonce_use_batch:
        return
    for name in ("infonce_include_qq", "infonce_include_dd"):
        if getattr(options, name):
            yield Problem(
                "MC320",
                f"--{name} true compares with the micro-batch, which --infonce_use_batch false "
                "leaves out",
                [f"fix: leave out --{name}, or --infonce_use_batch true"],
            )


def _tokens(options: RerankerConfig) -> Iterator[Problem]:
    words: list[Any] = [options.reranker_positive_token, options.reranker_negative_token]
    if words[0] == words[1]:
        yield Problem(
            "MC320",
            f"--reranker_positive_token and --reranker_negative_token are both {words[0]!r}",
            ["fix: --reranker_positive_token yes --reranker_negative_token no"],
        )
