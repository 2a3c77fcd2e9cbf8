"""What each router did in a step: loads, entropy, dropped tokens and losses, for the reports.

Shapes: T tokens, E experts, L layers with experts.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from mcore_core.model.names import unwrap

if TYPE_CHECKING:
    from mcore_core.model.config import DecoderConfig
    from mcore_core.model.moe.router import Router

LOSSES = ("aux_loss", "seq_aux_loss", "global_aux_loss", "z_loss")
_SUMS = ("tokens", "entropy", "dropped", *LOSSES, "replayed", "differing")
"""What a router adds up beside the load of each expert."""
LOAD_TABLE = "moe/load"
"""Choices of each expert, a row for each layer."""
type Tables = Mapping[str, Mapping[str, Sequence[float]]]


class RouterStats:
    """Sums of one router over the micro-batches of a step, on its device."""

    def __init__(self, experts: int) -> None:
        self.experts = experts
        self.counting = False
        """Whether a pass only counts what the whole batch asks for."""
        self.batch_E: Tensor = torch.zeros(experts, dtype=torch.float64)
        self._sums: Tensor | None = None

    def clear(self) -> None:
        """Begin a step."""
        self._sums = None

    def _at(self, like: Tensor) -> Tensor:
        if self._sums is None:
            size = self.experts + len(_SUMS)
            self._sums = torch.zeros(size, dtype=torch.float64, device=like.device)
        return self._sums

    def count_batch(self, routed_TE: Tensor) -> None:
        """Add what a micro-batch would choose by scores alone."""
        self.batch_E = self.batch_E.to(routed_TE.device) + routed_TE.double().sum(0)

    @torch.no_grad()
    def add(self, scores_TE: Tensor, demanded_TE: Tensor, kept_TE: Tensor, real_T1: Tensor) -> None:
        """Add one micro-batch.

        Args:
            scores_TE: Of the router.
            demanded_TE: Which experts tokens chose, padding left out.
            kept_TE: Which choices were within capacity.
            real_T1: True for tokens that are no padding.
        """
        sums = self._at(scores_TE)
        p_TE = scores_TE / (scores_TE.sum(-1, keepdim=True) + 1e-20)
        entropy_T1 = -(p_TE * (p_TE + 1e-20).log()).sum(-1, keepdim=True) * real_T1
        sums[: self.experts] += demanded_TE.sum(0)
        others = torch.stack(
            [
                real_T1.sum().double(),
                entropy_T1.sum().double(),
                (demanded_TE & ~kept_TE).sum().double(),
            ]
        )
        sums[self.experts : self.experts + len(others)] += others

    @torch.no_grad()
    def add_replay(self, own_TK: Tensor, given_TK: Tensor) -> None:
        """Count the choices that were given, and those which the router would not make itself."""
        given_T1 = (given_TK >= 0).all(-1, keepdim=True)
        differs_TK = (given_TK.unsqueeze(-1) != own_TK.unsqueeze(-2)).all(-1) & given_T1
        sums, first = self._at(own_TK), self.experts + _SUMS.index("replayed")
        sums[first] += given_T1.sum() * given_TK.shape[-1]
        sums[first + 1] += differs_TK.sum()

    def add_loss(self, name: str, share: Tensor) -> None:
        """Add this rank's share of a balancing loss, without its coefficient."""
        self._at(share)[self.experts + _SUMS.index(name)] += share.double()

    @property
    def sums(self) -> Tensor:
        """The loads of all experts, then the other sums."""
        if self._sums is None:
            return torch.zeros(self.experts + len(_SUMS), dtype=torch.float64)
        return self._sums


def routers(chunks: Sequence[Any]) -> "dict[int, Router]":
    """Return this rank's routers by the HF layer they are in."""
    found: dict[int, Router] = {}
    for wrapped in chunks:
        for module in unwrap(wrapped).modules():
            if isinstance(getattr(module, "stats", None), RouterStats):
                found[module.config.hf_layer(module.layer_number)] = module
    return found


def expert_layers(config: "DecoderConfig") -> tuple[int, ...]:
    """Return the HF layers that have experts, those of multi-token prediction after the others."""
    shape = config.shape
    if shape.moe is None:
        return ()
    layers = [n for n in shape.moe.layers if n < shape.num_layers]
    if shape.mtp_layers and shape.mtp_kind in shape.moe.layers:
        layers += range(shape.num_layers, shape.num_layers + shape.mtp_layers)
    return tuple(layers)


class ExpertReport:
    """The routers of a rank as one set of metrics of the step.

    Args:
        chunks: The model.
        device: Where collectives run.
    """

    def __init__(self, chunks: Sequence[Any], device: torch.device) -> None:
        self.config: DecoderConfig = chunks[0].config
        self.routers, self.device = routers(chunks), device
        self.layers = expert_layers(self.config)

    def begin(self) -> None:
        """Begin a step."""
        for router in self.routers.values():
            router.stats.clear()

    @property
    def counts_batch(self) -> bool:
        """Whether a balancing loss asks for the whole batch before its first gradient."""
        return self.config.balance == "global_aux_loss" and self.config.balance_coeff > 0

    def start_counting(self) -> None:
        """Let forward passes count what the batch asks for, until `stop_counting`."""
        for router in self.routers.values():
            router.stats.counting = True
            router.stats.batch_E = torch.zeros(router.stats.experts, dtype=torch.float64)

    def stop_counting(self) -> None:
        """Add up what all ranks counted; collective."""
        ranks = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        for router in self.routers.values():
            stats = router.stats
            stats.counting, stats.batch_E = False, stats.batch_E.to(self.device)
            dist.all_reduce(stats.batch_E, group=ranks)

    def _whole(self) -> Tensor:
        """Return the sums of every layer over all ranks, [L, E + sums + 1]; collective.

        A layer's tokens are divided over the ranks of its stage: each is counted once.
        """
        moe = self.config.shape.moe
        assert moe is not None
        whole = torch.zeros(len(self.layers), moe.num_experts + len(_SUMS) + 1, dtype=torch.float64)
        whole = whole.to(self.device)
        first = parallel_state.get_tensor_model_parallel_rank() == 0
        first &= parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
        for layer, router in self.routers.items():
            row = self.layers.index(layer)
            whole[row, :-1] = router.stats.sums.to(self.device)
            if first and router.expert_bias is not None:
                whole[row, -1] = router.expert_bias.double().norm()
        dist.all_reduce(whole)
        return whole.cpu()

    def finish(self) -> tuple[dict[str, float], Tables]:
        """Return the metrics of the step and its tables; collective.

        `moe/layer_N/...` are those of HF layer N, `moe/...` the mean over layers (the number, of
        dead experts). A load of 1 is an even share.
        """
        if not self.layers:
            return {}, {}
        whole, experts = self._whole(), self.config.shape.moe.num_experts  # type: ignore[union-attr]
        loads_LE = whole[:, :experts]
        each: dict[str, list[float]] = {}
        total = loads_LE.sum(-1).clamp(min=1)
        tokens = whole[:, experts].clamp(min=1)
        each["load_max"] = (loads_LE.amax(-1) * experts / total).tolist()
        share = loads_LE / total.unsqueeze(-1)
        even = torch.tensor(experts, dtype=torch.float64).log().clamp(min=1e-9)
        each["load_entropy"] = (-(share * (share + 1e-20).log()).sum(-1) / even).tolist()
        each["router_entropy"] = (whole[:, experts + 1] / tokens).tolist()
        each["dead_experts"] = (loads_LE == 0).double().sum(-1).tolist()
        each |= self._optional(whole, experts, total)
        metrics = {}
        for name, values in each.items():
            together = sum(values) if name == "dead_experts" else sum(values) / len(values)
            metrics[f"moe/{name}"] = together
            for layer, value in zip(self.layers, values, strict=True):
                metrics[f"moe/layer_{layer}/{name}"] = value
        rows = zip(self.layers, loads_LE.tolist(), strict=True)
        return metrics, {LOAD_TABLE: {f"layer {n}": row for n, row in rows}}

    def _optional(self, whole: Tensor, experts: int, total: Tensor) -> dict[str, list[float]]:
        config, found = self.config, {}
        if config.moe_expert_capacity_factor is not None:
            found["dropped"] = (whole[:, experts + 2] / total).tolist()
        on = {config.balance: config.balance_coeff, "z_loss": config.moe_z_loss_coeff}
        for name in LOSSES:
            if on.get(name):
                found[name] = whole[:, experts + _SUMS.index(name)].tolist()
        first = experts + _SUMS.index("replayed")
        replayed = whole[:, first]
        if float(replayed.sum()) > 0:
            found["replay_mismatch"] = (whole[:, first + 1] / replayed.clamp(min=1)).tolist()
        if config.shape.moe is not None and config.shape.moe.expert_bias:
            found["bias_norm"] = whole[:, -1].tolist()
        return found
