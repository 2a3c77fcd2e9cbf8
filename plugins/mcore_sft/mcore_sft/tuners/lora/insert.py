"""Puts adapters beside the layers of a chunk: as their child `adapter`, acting through hooks.

A layer keeps its class, its parameters and their names, so that everything that reads the model's
weights sees them as without adapters.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.utils import sharded_state_dict_default
from torch import Tensor

from mcore_core.model.head import HeadLayer
from mcore_core.model.latent_attention import WholeLinear
from mcore_core.model.moe.experts import GroupedLinear
from mcore_core.model.names import canonical
from mcore_sft.tuners.lora.layers import (
    ALIKE,
    APART,
    EXPERTS,
    Adapter,
    ColumnAdapter,
    EmbeddingAdapter,
    ExpertsAdapter,
    RowAdapter,
    Setting,
    Switch,
    WeightAdapter,
    WholeAdapter,
)
from mcore_sft.tuners.lora.matrices import Pair, build

if TYPE_CHECKING:
    from mcore_sft.tuners.lora.spec import LoraSpec
    from mcore_sft.tuners.lora.split import Projection


def insert(
    chunk: Any,  # noqa: ANN401
    projections: "Sequence[Projection]",
    spec: "LoraSpec",
    switch: Switch,
    *,
    seed: int,
) -> list[Adapter]:
    """Add the adapters of those projections that this chunk holds; return them.

    Args:
        chunk: A Decoder.
        projections: What is adapted, of the whole model.
        spec: Rank, scale and dropout.
        switch: Turns all of them off.
        seed: Of the run.
    """
    by_module: dict[str, list[Projection]] = {}
    for projection in projections:
        by_module.setdefault(projection.module, []).append(projection)
    found = []
    for name, module in list(chunk.named_modules()):
        mine = by_module.get(canonical(name, chunk.first_layer))
        if mine is not None:
            found.append(_Insertion(chunk, module, mine, spec, switch, seed).run())
    return found


class _Insertion:
    """Adds the adapters of one layer."""

    def __init__(
        self,
        chunk: Any,  # noqa: ANN401
        module: Any,  # noqa: ANN401
        projections: "list[Projection]",
        spec: "LoraSpec",
        switch: Switch,
        seed: int,
    ) -> None:
        self.chunk, self.module, self.projections = chunk, module, projections
        self.spec, self.switch, self.seed = spec, switch, seed
        self.weight = projections[0].entry.weight.rpartition(".")[2]

    def run(self) -> Adapter:
        """Build the adapter, hook it to the layer, and return it."""
        module = self.module
        match module:
            case GroupedLinear():
                adapter: Adapter = self._build(ExpertsAdapter, module.weight)
                self._after(adapter, lambda args, out: out + adapter(*args))
            case VocabParallelEmbedding():
                adapter = self._build(EmbeddingAdapter, module.weight)
                first, scattered = module.vocab_start_index, module.reduce_scatter_embeddings
                self._after(
                    adapter, lambda args, out: out + adapter(args[0], first, scattered=scattered)
                )
            case HeadLayer():
                adapter = self._build(WeightAdapter, self.chunk.head_weight())
                self._replace_head(adapter)
            case TopKRouter():
                adapter = self._build(WeightAdapter, module.weight)
                self._replace_weight(adapter)
            case WholeLinear():
                adapter = self._build(WholeAdapter, module.weight)
                self._after(adapter, lambda args, out: adapter(args[0], out))
            case _ if self.weight == "gate_weight":
                adapter = self._build(WeightAdapter, module.gate_weight)
                self._replace_weight(adapter)
            case _:
                kind = RowAdapter if self.projections[0].split == 1 else ColumnAdapter
                adapter = self._build(kind, module.weight)
                self._after(adapter, lambda args, out: (adapter(args[0], out[0]), *out[1:]))
        module.adapter = adapter
        self._save_with(adapter)
        return adapter

    def _build(self, kind: type[Adapter], base: Tensor) -> Adapter:
        config, experts = self.chunk.config, self.projections[0].experts
        pairs = [
            build(
                projection,
                base,
                rank=self.spec.rank_of(projection.name),
                scale=self.spec.scale_of(projection.name),
                seed=self.seed,
                partial=bool(config.sequence_parallel),
            )
            for projection in self.projections
        ]
        setting = Setting(
            switch=self.switch,
            dropout=self.spec.dropout,
            group=mpu.get_expert_tensor_parallel_group()
            if experts
            else mpu.get_tensor_model_parallel_group(),
            sequence_parallel=bool(config.sequence_parallel) and not experts,
        )
        height = base.shape[1] if experts else base.shape[0]
        weight_only = kind in (WeightAdapter, EmbeddingAdapter)
        return kind(pairs, setting, () if weight_only else _order(pairs, height))

    def _after(self, adapter: Adapter, change: Callable[[Any, Any], Any]) -> None:
        """Change what the layer returns while adapters are on."""

        def hook(_: torch.nn.Module, args: Any, out: Any) -> Any:  # noqa: ANN401
            return change(args, out) if adapter.setting.switch.on else out

        self.module.register_forward_hook(hook)

    def _replace_weight(self, adapter: Adapter) -> None:
        """Let the layer see the changed weight while it runs: its own is a parameter below it."""
        name = self.weight

        def before(module: torch.nn.Module, _: Any) -> None:  # noqa: ANN401
            if adapter.setting.switch.on:
                module.__dict__[name] = adapter(module._parameters[name])

        def after(module: torch.nn.Module, *_: object) -> None:
            module.__dict__.pop(name, None)

        self.module.register_forward_pre_hook(before)
        self.module.register_forward_hook(after, always_call=True)

    def _replace_head(self, adapter: Adapter) -> None:
        own = self.chunk.head_weight

        def head_weight() -> Tensor:
            weight: Tensor = own()
            return adapter(weight) if adapter.setting.switch.on else weight

        self.chunk.head_weight = head_weight

    def _save_with(self, adapter: Adapter) -> None:
        """Let the layer's checkpoint hold the adapter: megatron's layers do not ask children."""
        module = self.module
        own = getattr(module, "sharded_state_dict", None)

        def sharded_state_dict(
            prefix: str = "",
            sharded_offsets: Any = (),  # noqa: ANN401
            metadata: dict[str, Any] | None = None,
            **kwargs: Any,  # noqa: ANN401
        ) -> ShardedStateDict:
            if own is None:
                del module.sharded_state_dict
                found = sharded_state_dict_default(module, prefix, sharded_offsets, metadata)
                module.sharded_state_dict = sharded_state_dict
            else:
                found = own(prefix, sharded_offsets, metadata, **kwargs)
            mine = adapter.sharded_state_dict(f"{prefix}adapter.", sharded_offsets, metadata)
            return {**found, **mine}

        module.sharded_state_dict = sharded_state_dict


def _order(pairs: Sequence[Pair], height: int) -> list[int]:
    """Return for each row of the rank's weight which row of the B matrices, stacked, it is."""
    order, start = [-1] * height, 0
    for pair in pairs:
        rows = pair.projection.rows(pair.place.rank, pair.place.size)
        for i, (_, row) in enumerate(rows, start):
            order[row] = i
        start += len(rows)
    return order


def add_random_states(seed: int) -> None:
    """Add the states that dropout of adapters draws from; checkpoints hold them."""
    tracker = get_cuda_rng_tracker()
    tp, pp = mpu.get_tensor_model_parallel_rank(), mpu.get_pipeline_model_parallel_rank()
    data = mpu.get_data_parallel_rank(with_context_parallel=True)
    expert = mpu.get_expert_data_parallel_rank(), mpu.get_expert_model_parallel_rank()
    places = {ALIKE: (pp, data), APART: (pp, data, 1 + tp), EXPERTS: (pp, *expert)}
    for name, place in places.items():
        if name not in tracker.get_states():
            number = torch.Generator().manual_seed(hash((seed, *place)) % 2**31).initial_seed()
            tracker.add(name, number + len(name))
