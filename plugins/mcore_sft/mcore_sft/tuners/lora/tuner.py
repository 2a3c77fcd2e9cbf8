"""The `lora` tuner: adapters train, the model's own weights stay as they are."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from torch import Tensor

from mcore_core.config.train import TrainConfig
from mcore_core.config.tuner import LoraConfig
from mcore_core.config.weights import WeightsConfig
from mcore_core.errors import usage_error
from mcore_core.model.names import named_adapters, named_weights, unwrap
from mcore_sft.tuners.lora import peft_config, start
from mcore_sft.tuners.lora.beside import Originals, beside
from mcore_sft.tuners.lora.insert import add_random_states, insert
from mcore_sft.tuners.lora.layers import Adapter, Switch
from mcore_sft.tuners.lora.merge import Merged
from mcore_sft.tuners.lora.peft_table import adapter_rules, weight_rules
from mcore_sft.tuners.lora.spec import WEIGHTS
from mcore_sft.tuners.lora.split import projections
from mcore_sft.tuners.lora.targets import select
from mcore_sft.tuners.parameters import keep_bias_gradients, needs_gradient, parameters_of
from mcore_sft.tuners.table import entries, memory_rules, tied_head

if TYPE_CHECKING:
    from mcore_core.model.family import Rule
    from mcore_core.protocols import ModelChunk, TunerContext


class Lora:
    """Implements protocols.Tuner."""

    partial = True

    def __init__(self, context: "TunerContext") -> None:
        """Read the options, and the config of the adapter that the run starts from."""
        self.context, self.spec = context, start.spec_of(context.config)
        new_head = context.architecture.head == "scores" and self.spec.folder is None
        if new_head and "score" not in self.spec.saved_modules:  # as PEFT does for SEQ_CLS
            saved = (*self.spec.saved_modules, "score")
            self.spec = dataclasses.replace(self.spec, saved_modules=saved)
        self.tied = context.architecture.tie_word_embeddings
        self.table = list(entries(memory_rules(context.family, context.architecture)))
        head = [tied_head(self.table)] if self.tied else []
        self.every = projections([*self.table, *head])
        self.projections = (
            select(self.spec, self.every)
            if self.spec.folder is None
            else start.in_file(self.spec.folder / WEIGHTS, self.spec, self.every)
        )
        self.beside = beside(self.spec, self.table, self.projections, tied=self.tied)
        self.adapters: list[Adapter] = []
        self.mergeable = not (self.tied and any(p.entry.rule.pad for p in self.projections))
        if context.config[WeightsConfig].merge_lora and not self.mergeable:
            raise usage_error(
                "MC557",
                "--merge_lora true: embedding and output layer are one weight in this model, and "
                "only one of them has the adapter",
                "fix: --merge_lora false, or leave embed_tokens and lm_head out of the targets",
            )
        config = context.config
        overlaps = "moe_shared_expert_overlap" in config.names and config.get(
            "moe_shared_expert_overlap"
        )
        if overlaps and any(".shared_experts" in p.module for p in self.projections):
            raise usage_error(
                "MC560",
                "--moe_shared_expert_overlap runs shared experts in parts, beside their adapters",
                "fix: leave it out, or leave shared experts out of the targets",
            )
        self._switch = Switch()
        self._originals = Originals([])

    def apply(self, chunks: "Sequence[ModelChunk]") -> None:
        """Freeze the model and put adapters beside its layers."""
        seed = self.context.config[TrainConfig].seed
        add_random_states(seed)
        trains = {entry.weight for entry in self.beside}
        for wrapped in chunks:
            chunk = unwrap(wrapped)
            chunk.requires_grad_(False)
            for entry, parameter in parameters_of([chunk], self.beside):
                parameter.requires_grad_(entry.weight in trains)
            for module in chunk.modules():
                if hasattr(module, "expert_bias"):
                    module.frozen_expert_bias = True
            self.adapters += insert(chunk, self.projections, self.spec, self._switch, seed=seed)
            if hasattr(chunk, "embedding"):
                chunk.embedding.register_forward_hook(needs_gradient)
        keep_bias_gradients(chunks)

    def load(self, chunks: "Sequence[ModelChunk]") -> None:
        """Fill the adapters from what the run starts from; collective."""
        self._originals = Originals([p for _, p in parameters_of(chunks, self.beside)])
        options = self.context.config[LoraConfig]
        if self.spec.folder is not None:
            start.read_peft(self, chunks, self.spec.folder)
        elif options.adapter_load is not None:
            start.read_checkpoint(self, chunks, Path(options.adapter_load).expanduser())

    @contextmanager
    def disabled(self, chunks: "Sequence[ModelChunk]") -> Iterator[None]:
        """Let the model compute as it did before it was tuned."""
        before, self._switch.on = self._switch.on, False
        try:
            with self._originals.in_place():
                yield
        finally:
            self._switch.on = before

    def merged(self, chunks: "Sequence[ModelChunk]") -> Mapping[str, Tensor]:
        """Return the weights with the adapters added, each computed when it is asked for."""
        return Merged(named_weights(chunks), self.adapters)

    @torch.no_grad()
    def absorb(self, chunks: "Sequence[ModelChunk]") -> None:
        """Add the adapters to the weights, in place, and switch them off for good."""
        own = named_weights(chunks)
        for name, weight in self.merged(chunks).items():
            own[name].copy_(weight)
        self._switch.on = False

    def export(self, chunks: "Sequence[ModelChunk]", path: Path) -> None:
        """Write the adapter in PEFT's format; collective."""
        assert self.context.bridge is not None
        self.context.bridge.save_table(self.rules(), self.tensors(chunks), path / WEIGHTS)
        if dist.get_rank() == 0:
            found = peft_config.describe(
                self.spec,
                self.projections,
                self.every,
                base=self.context.config[WeightsConfig].model or "",
                saved=self.spec.saved_modules,
                task="SEQ_CLS" if self.context.architecture.head == "scores" else "CAUSAL_LM",
            )
            peft_config.write(path, found)

    def rules(self) -> "list[Rule]":
        """Return the table between PEFT's file and this rank's tensors."""
        sizes = {
            "tp": mpu.get_tensor_model_parallel_world_size(),
            "etp": mpu.get_expert_tensor_parallel_world_size(),
        }
        ranks = {p.name: self.spec.rank_of(p.name) for p in self.projections}
        found = adapter_rules(self.projections, ranks, sizes)
        return [*found, *weight_rules(self.beside, self.projections)]

    def tensors(self, chunks: "Sequence[ModelChunk]") -> dict[str, Tensor]:
        """Return what this rank has of everything that trains, by canonical name."""
        weights, names = named_weights(chunks), {r.mcore for r in self.rules()}
        own = {n: w for n, w in weights.items() if start.without_expert(n) in names}
        return {**named_adapters(chunks), **own}

    def identity(self) -> dict[str, Any]:
        """Return what two runs must share for one to go on from the other's checkpoint."""
        spec = self.spec
        return {
            "tuner_type": "lora",
            "lora_rank": spec.rank,
            "lora_alpha": spec.alpha,
            "use_rslora": spec.rslora,
            "adapters": [p.name for p in self.projections],
            "trained in full": [e.weight for e in self.beside],
        }
