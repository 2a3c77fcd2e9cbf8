"""The bridge that the kernel calls: a plan from a family's table, and what is derived from it."""

from typing import TYPE_CHECKING, Any

from mcore_hfbridge.coverage import Coverage, coverage
from mcore_hfbridge.export import export
from mcore_hfbridge.load import load
from mcore_hfbridge.plan import Plan
from mcore_hfbridge.predictions import announced
from mcore_hfbridge.ranks import Ranks
from mcore_hfbridge.save import save, save_file
from mcore_hfbridge.upcycle import Upcycling, upcycle

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    import torch

    from mcore_core.model.architecture import Architecture
    from mcore_core.model.family import Family, Rule
    from mcore_core.protocols import ModelChunk


class HFBridge:
    """Moves weights between Hugging Face safetensors and megatron-core; see protocols.Bridge."""

    def __init__(self, family: "Family", architecture: "Architecture") -> None:
        self.family, self.architecture = family, architecture
        self.plan = Plan(family, architecture)
        others = [Plan(family, architecture, rules(architecture)) for rules in family.also_reads]
        self.plans = [self.plan, *others]

    @staticmethod
    def upcycle(
        source: "Path",
        path: "Path",
        *,
        copies: int,
        granularity: int,
        topk: int,
        seed: int,
        max_shard_size: int,
    ) -> str:
        """Write a dense model as one of experts; return what it became. See `upcycle.upcycle`."""
        how = Upcycling(copies=copies, granularity=granularity, topk=topk, seed=seed)
        made = upcycle(source, path, how, max_shard_size=max_shard_size)
        chosen = made["num_experts_per_tok"]
        return f"{made['model_type']}, {how.experts} experts of which a token takes {chosen}"

    def load(self, chunks: "Sequence[ModelChunk]", path: "Path") -> None:
        """Fill this rank's parameters; collective. Raises UsageError naming every problem."""
        weights = _weights(chunks)
        load(self.plans, weights, path, Ranks.of(weights))

    def save(
        self,
        chunks: "Sequence[ModelChunk]",
        path: "Path",
        *,
        max_shard_size: int,
        source: "Path | None",
        weights: "Mapping[str, torch.Tensor] | None" = None,
        config: "Mapping[str, Any] | None" = None,
    ) -> None:
        """Write an HF checkpoint; collective. Files hold at most `max_shard_size` bytes.

        `source` gives config.json, into which `config` is merged, and the tokenizer's files.
        Prediction layers that the model goes without are not announced.
        """
        own = _weights(chunks)
        config = self.config_changes(source) | dict(config or {})
        written = own if weights is None else weights
        save(self.plan, written, path, Ranks.of(own), max_shard_size, source, config)

    def config_changes(self, source: "Path | None") -> dict[str, Any]:
        """Return what config.json of a saved model says other than the source's."""
        if source is None or announced(self.family, source) <= self.architecture.mtp_layers:
            return {}
        return {self.family.mtp_key: self.architecture.mtp_layers}

    def export(
        self,
        chunks: "Sequence[ModelChunk]",
        *,
        weights: "Mapping[str, torch.Tensor] | None" = None,
    ) -> "Iterator[tuple[str, torch.Tensor]]":
        """Yield full HF-named tensors, in the same order on every rank; collective."""
        own = _weights(chunks)
        yield from export(self.plan, own if weights is None else weights, Ranks.of(own))

    def load_table(
        self, rules: "Sequence[Rule]", tensors: "Mapping[str, torch.Tensor]", file: "Path"
    ) -> None:
        """Fill a tuner's tensors from one file; collective. Raises UsageError as `load` does."""
        plan = Plan(self.family, self.architecture, rules)
        load([plan], tensors, file.parent, Ranks.of(tensors), file=file.name)

    def save_table(
        self, rules: "Sequence[Rule]", tensors: "Mapping[str, torch.Tensor]", file: "Path"
    ) -> None:
        """Write a tuner's tensors into one file; collective."""
        plan = Plan(self.family, self.architecture, rules)
        save_file(plan, tensors, file, Ranks.of(tensors))

    def coverage(self, path: "Path") -> Coverage:
        """Return which tensors of a folder each rule claims; reads headers only."""
        return coverage(self.plans, path)


def _weights(chunks: "Sequence[ModelChunk]") -> "dict[str, torch.Tensor]":
    from mcore_core.model.names import named_weights  # noqa: PLC0415  (imports megatron)

    return named_weights(chunks)
