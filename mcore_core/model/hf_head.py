"""Heads as config.json says them: which one a checkpoint has, and what is written of one."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mcore_core.errors import usage_error

if TYPE_CHECKING:
    from mcore_core.model.architecture import Architecture
    from mcore_core.protocols import HeadSpec

CLASSIFIER = "ForSequenceClassification"
LANGUAGE_MODEL = "ForCausalLM"
_ENDING = re.compile(rf"({CLASSIFIER}|{LANGUAGE_MODEL}|Model)$")


def stem(name: str) -> str:
    """Return an architecture's name without its head: Qwen3 of Qwen3ForCausalLM."""
    return _ENDING.sub("", name)


def as_language_model(name: str) -> str:
    """Return the name of the language model that an architecture is built on, else the name."""
    found = _ENDING.search(name)
    return stem(name) + LANGUAGE_MODEL if found and found[1] != LANGUAGE_MODEL else name


def read_head(architecture: "Architecture", hf_config: Mapping[str, Any]) -> "Architecture":
    """Return the architecture with the head that config.json names."""
    name = str((hf_config.get("architectures") or [""])[0])
    if name.endswith(CLASSIFIER):
        return replace(architecture, head="scores", scores=labels(hf_config), mtp_layers=0)
    if name.endswith("Model"):
        return replace(architecture, head="none", mtp_layers=0)
    return architecture


def labels(hf_config: Mapping[str, Any]) -> int:
    """Return how many labels a classifier's config has; transformers' default is 2."""
    found = hf_config.get("id2label")
    return len(found) if found else int(hf_config.get("num_labels") or 2)


def with_head(
    architecture: "Architecture", spec: "HeadSpec", hf_config: Mapping[str, Any]
) -> "Architecture":
    """Return the architecture with the head that a recipe asks for.

    Args:
        architecture: With the head of the checkpoint.
        spec: The recipe's.
        hf_config: Of the checkpoint, for messages.

    Raises:
        UsageError: The checkpoint has a score head of another size, or none where an output layer
            is needed.
    """
    name = str((hf_config.get("architectures") or [""])[0])
    match spec.output:
        case "scores":
            if architecture.head == "scores" and architecture.scores != spec.scores:
                raise usage_error(
                    "MC546",
                    f"the model is a {name} with {architecture.scores} labels, the run needs "
                    f"{spec.scores}",
                    f"fix: --num_labels {architecture.scores}, or start from the language model",
                )
            return replace(architecture, head="scores", scores=spec.scores, mtp_layers=0)
        case "hidden":
            return replace(architecture, head="none", scores=0, mtp_layers=0)
        case _:
            if architecture.head != "lm" and not architecture.tie_word_embeddings:
                raise usage_error(
                    "MC546",
                    f"the model is a {name}, which has no output layer to predict tokens with",
                    f"fix: --model with a {as_language_model(name)}, or another --task_type",
                )
            return replace(architecture, head="lm", scores=0)


def write_head(architecture: "Architecture", hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of config.json that name the head; nothing where they stay as they are."""
    name = str((hf_config.get("architectures") or [""])[0])
    if architecture.head == "lm":
        return {"architectures": [as_language_model(name)]} if name.endswith(CLASSIFIER) else {}
    if architecture.head == "none":
        return {"architectures": [stem(name) + "Model"]}
    entries: dict[str, Any] = {"architectures": [_classifier(name, hf_config)]}
    if labels(hf_config) != architecture.scores or not hf_config.get("id2label"):
        names = [f"LABEL_{i}" for i in range(architecture.scores)]
        entries["id2label"] = {str(i): label for i, label in enumerate(names)}
        entries["label2id"] = {label: i for i, label in enumerate(names)}
    return entries


def _classifier(name: str, hf_config: Mapping[str, Any]) -> str:
    """Return the class that transformers opens it with, by its own list where it has one."""
    if name.endswith(CLASSIFIER):
        return name
    from transformers.models.auto.modeling_auto import (  # noqa: PLC0415  (slow to import)
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as KNOWN,
    )

    known = KNOWN.get(hf_config.get("model_type", ""))
    return str(known) if known else stem(name) + CLASSIFIER
