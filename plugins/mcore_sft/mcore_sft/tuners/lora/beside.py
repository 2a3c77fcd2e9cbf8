"""The model's own parameters that train beside the adapters: modules_to_save and biases."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from mcore_core.errors import Problem, UsageError

if TYPE_CHECKING:
    from mcore_sft.tuners.lora.spec import LoraSpec
    from mcore_sft.tuners.lora.split import Projection
    from mcore_sft.tuners.table import Entry


def beside(
    spec: "LoraSpec", table: "Sequence[Entry]", chosen: "Sequence[Projection]", *, tied: bool
) -> "list[Entry]":
    """Return the parameters that train in full.

    Raises:
        UsageError: A module of modules_to_save does not exist, is only a part of a parameter, has
            an adapter too, or is one with another in a tied model.
    """
    problems: list[Problem] = []
    saved: dict[str, Entry] = {}
    for target in spec.saved_modules:
        mine = [e for e in table if any(_below(name, target) for name in e.hf)]
        problems += _check(target, mine, chosen, table, tied=tied)
        saved |= {e.weight: e for e in mine}
    if problems:
        raise UsageError(problems)
    if spec.biases:
        saved |= {e.weight: e for e in table if _is_bias(e)}
    return [e for e in table if e.weight in saved]


def _is_bias(entry: "Entry") -> bool:
    """Return whether it is a bias; those of experts stay as they are, since PEFT's files lose them.

    What chooses experts (`expert_bias`) is no parameter.
    """
    names = [name.rpartition(".")[2] for name in entry.hf]
    return (
        all("bias" in n for n in names)
        and not entry.experts
        and not entry.weight.endswith("expert_bias")
    )


def _below(name: str, target: str) -> bool:
    """Return whether a tensor is in a module whose path ends so (as PEFT compares), or within it.

    The path need not be cut at a dot: `norm` is every `input_layernorm` too.
    """
    parts = name.split(".")
    return any(".".join(parts[:i]).endswith(target) for i in range(1, len(parts)))


def _check(
    target: str,
    mine: "list[Entry]",
    chosen: "Sequence[Projection]",
    table: "Sequence[Entry]",
    *,
    tied: bool,
) -> list[Problem]:
    option = f"--modules_to_save {target}"
    if not mine:
        known = dict.fromkeys(n.rpartition(".")[0].rpartition(".")[2] for e in table for n in e.hf)
        there = f"modules: {', '.join(n for n in known if n)}"
        return [Problem("MC554", f"{option}: the model has no such module", [there])]
    for entry in mine:
        parts = [n for n in entry.hf if _below(n, target)]
        if len(parts) < len(entry.hf):
            rest = [n for n in entry.hf if n not in parts]
            return [
                Problem(
                    "MC556",
                    f"{option}: {parts[0]} lies in one parameter with {', '.join(rest)}",
                    ["fix: name them all, or give it an adapter with --target_modules"],
                )
            ]
        if any(p.entry.weight == entry.weight for p in chosen):
            return [
                Problem(
                    "MC556",
                    f"{option}: {entry.hf[0]} has an adapter too",
                    ["fix: name it in one of --modules_to_save and --target_modules"],
                )
            ]
        if tied and entry.weight == "embedding.word_embeddings.weight":
            return [
                Problem(
                    "MC556",
                    f"{option}: embedding and output layer are one weight in this model, which "
                    "PEFT would train as two",
                    ["fix: give it an adapter with --target_modules"],
                )
            ]
    return []


class Originals:
    """What parameters that train beside the adapters held before."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        self._pairs = [(p, p.detach().clone()) for p in parameters]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put them back for a while."""
        trained = [p.data for p, _ in self._pairs]
        for parameter, original in self._pairs:
            parameter.data = original
        try:
            yield
        finally:
            for (parameter, _), data in zip(self._pairs, trained, strict=True):
                parameter.data = data
