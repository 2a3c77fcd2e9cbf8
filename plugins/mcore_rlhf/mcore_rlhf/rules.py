"""Contradictions between options of preference and reinforcement learning, seen without torch."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mcore_core.checkpoint import folders as checkpoints
from mcore_core.config.compose import RunConfig
from mcore_core.errors import Problem


def check_method(config: RunConfig, plugin: str) -> Iterator[Problem]:
    """Yield a problem where `rlhf_type` names another method than the plugin."""
    named = config.get("rlhf_type")
    if named not in (None, plugin):
        yield Problem(
            "MC330",
            f"--rlhf_type {named} and --plugin {plugin} name different methods",
            [f"fix: --plugin {named}, or leave out --rlhf_type"],
        )


def check_reference(config: RunConfig, *, used: bool, why: str = "") -> Iterator[Problem]:
    """Yield problems of the reference model's options.

    Args:
        config: The options.
        used: Whether the loss has a reference.
        why: What makes it have none.
    """
    names = ("ref_model", "ref_load", "ref_adapters", "ref_adapter_load")
    given = [name for name in names if config.get(name)]
    if not used:
        for name in given:
            yield Problem(
                "MC331",
                f"--{name} does nothing: {why} has no reference model",
                [f"fix: leave out --{name}"],
            )
        return
    anew = config.get("finetune") and config.get("tuner_type") == "full"
    if config.get("load") and anew and not given:
        yield Problem(
            "MC320",
            "--finetune starts the policy from --load, and the reference would be --model",
            [
                f"fix: --ref_load {config.get('load')} for the policy as it starts, "
                "or --ref_model for another model"
            ],
        )
    if config.get("ref_adapters") and config.get("ref_adapter_load"):
        yield Problem(
            "MC320",
            "--ref_adapters and --ref_adapter_load both give the reference's adapters",
            ["fix: keep one of them"],
        )
    else:
        yield from _check_adapters(config.get("ref_adapters"))
        yield from _check_runs(config)
    if config.get("ref_model"):
        yield from _check_vocabulary(config.get("model"), config.get("ref_model"))


def _check_adapters(folders: list[str]) -> Iterator[Problem]:
    """Yield a problem of --ref_adapters; whether a folder holds adapters is looked at later."""
    if len(folders) > 1:
        yield Problem(
            "MC553",
            f"--ref_adapters {' '.join(folders)}: a model has one adapter at a time",
            ["fix: merge the first with mcore export --merge_lora true, as --ref_model"],
        )


def _check_runs(config: RunConfig) -> Iterator[Problem]:
    """Look into the runs of --ref_load and --ref_adapter_load: the one trained all weights."""
    for name, other in (("ref_load", "ref_adapter_load"), ("ref_adapter_load", "ref_load")):
        given = config.get(name)
        if given is None:
            continue
        found = checkpoints.find(Path(given).expanduser())
        if found is None:  # said with all other paths
            continue
        partial = found.training.get("tuner", {}).get("tuner_type", "full") != "full"
        if partial != (name == "ref_adapter_load"):
            what = "adapters alone" if partial else "all weights, and no adapters"
            yield Problem(
                "MC707",
                f"--{name} {given}: {found.path} is of a run that trained {what}",
                [f"fix: --{other} {given}"],
            )


def _check_vocabulary(model: str | None, reference: str) -> Iterator[Problem]:
    """Compare what lies in two folders; hub models are checked when they have been fetched."""
    sizes = [_vocabulary_size(folder) for folder in (model, reference)]
    if None not in sizes and sizes[0] != sizes[1]:
        yield Problem(
            "MC519",
            f"the reference {reference} has another vocabulary than the model",
            [
                f"vocab_size: {sizes[0]} in {model}, {sizes[1]} in {reference}",
                "fix: --ref_model with a model of the same tokenizer",
            ],
        )
        return
    words = [_words(folder) for folder in (model, reference)]
    if None not in words and words[0] != words[1]:
        yield Problem(
            "MC519",
            f"the reference {reference} has another vocabulary than the model",
            [
                "their tokenizer.json give other ids to the same words",
                "fix: --ref_model with a model of the same tokenizer",
            ],
        )


def _vocabulary_size(folder: str | None) -> int | None:
    config = _read(folder, "config.json")
    size = config.get("vocab_size") if isinstance(config, dict) else None
    return size if isinstance(size, int) else None


def _words(folder: str | None) -> Any:  # noqa: ANN401
    tokenizer = _read(folder, "tokenizer.json")
    model = tokenizer.get("model") if isinstance(tokenizer, dict) else None
    return model.get("vocab") if isinstance(model, dict) else None


def _read(folder: str | None, name: str) -> Any:  # noqa: ANN401
    """Return the JSON file, or None where it cannot be read: the kernel reports that."""
    if folder is None:
        return None
    try:
        return json.loads((Path(folder).expanduser() / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
