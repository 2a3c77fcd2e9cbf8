"""Experts in one parameter a matrix: torch's grouped product on a GPU, a loop without.

Shapes: E experts of this expert-parallel rank, T tokens sorted by expert, F this rank's part of an
expert's width, H the hidden size.
"""

from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.fusions.fused_bias_swiglu import weighted_bias_swiglu_impl
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import divide
from torch import Tensor

from mcore_core.model.config import DecoderConfig

type Counts = list[int] | Tensor
"""Tokens of each expert; or, known on the device alone, where each one's end, [E], int32."""


def grouped_product(
    x_TI: Tensor, weight_EOI: Tensor, counts: Counts, *, grouped: bool = True
) -> Tensor:
    """Return each token times its expert's matrix, [T, O].

    `grouped` takes one product of all experts where the device has it.

    No shortcut for an expert without tokens: every rank runs the same collectives backward.
    """
    if grouped and has_grouped_product(weight_EOI) and x_TI.dtype is weight_EOI.dtype:
        ends = counts
        if not isinstance(ends, Tensor):
            ends = torch.tensor(ends, device=x_TI.device).cumsum(0).to(torch.int32)
        product: Tensor = torch._grouped_mm(x_TI, weight_EOI.transpose(-2, -1), offs=ends)
        return product
    if isinstance(counts, Tensor):
        counts = counts.diff(prepend=counts.new_zeros(1)).tolist()
    parts = zip(torch.split(x_TI, counts), weight_EOI.unbind(0), strict=True)
    return torch.cat([x @ weight.t() for x, weight in parts])


def has_grouped_product(weight_EOI: Tensor) -> bool:
    """Return whether one product of all experts is there for these: on a GPU, in bfloat16.

    It wants every row to begin at a multiple of 16 bytes.
    """
    _, outputs, inputs = weight_EOI.shape
    half = weight_EOI.is_cuda and weight_EOI.dtype is torch.bfloat16
    return half and outputs % 8 == 0 and inputs % 8 == 0


class _OnFirst(torch.autograd.Function):
    """The values on one rank and zeros on the others, whose outputs are added up.

    All ranks hold the same values and see the same gradient: it goes through on each.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, first: bool) -> Tensor:  # type: ignore[override]  # noqa: ANN401
        return values.clone() if first else torch.zeros_like(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]  # noqa: ANN401
        return grad, None


class GroupedLinear(MegatronModule):  # type: ignore[misc]
    """One matrix, and one bias, of each expert of this rank.

    Args:
        config: The decoder's configuration.
        experts: Experts of this rank.
        inputs: Input channels of this rank.
        outputs: Output channels of this rank.
        groups: Process groups.
        split: Which dimension of a matrix expert-tensor-parallel ranks share: 0 outputs, 1 inputs.
        blocks: Into how many blocks (gate, up) the outputs fall; each is shared separately.
        bias: Whether there are biases.
        init_method: Draws the matrices.
    """

    def __init__(
        self,
        config: DecoderConfig,
        experts: int,
        inputs: int,
        outputs: int,
        groups: Any,  # noqa: ANN401
        *,
        split: int,
        blocks: int,
        bias: bool,
        init_method: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(config=config)
        self.experts, self.split, self.blocks = experts, split, blocks
        self.ep_group, self.tp_group, self.dp_group = groups.ep, groups.expt_tp, groups.expt_dp
        device: Any = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        options: Any = {"dtype": config.params_dtype, "device": device}
        self.weight = torch.nn.Parameter(torch.empty(experts, outputs, inputs, **options))
        self.bias: torch.nn.Parameter | None = None
        if bias:
            self.bias = torch.nn.Parameter(torch.zeros(experts, outputs, **options))
        if config.perform_initialization:
            init_method(self.weight)
        for parameter, dim in ((self.weight, 1 + split), (self.bias, 1)):
            if parameter is None:
                continue
            parameter.allreduce = False  # type: ignore[attr-defined]  # expert-data-parallel group
            # what the expert-tensor-parallel ranks hold alike is counted once in the norm
            alike = parameter is self.bias and split == 1 and self.tp_group.size() > 1
            if not alike:
                set_tensor_model_parallel_attributes(parameter, True, dim, 1)

    def forward(self, x_TI: Tensor, counts: Counts) -> Tensor:
        """Return [T, O] without biases."""
        return grouped_product(x_TI, self.weight, counts, grouped=self.config.moe_grouped_gemm)

    def token_bias(self, counts: Counts, tokens: int) -> Tensor | None:
        """Return the bias of each token's expert, [T, O]; summed over ranks it counts once."""
        if self.bias is None:
            return None
        bias: Tensor = self.bias
        if self.split == 1 and self.tp_group.size() > 1:
            bias = _OnFirst.apply(bias, self.tp_group.rank() == 0)  # type: ignore[no-untyped-call]
        if isinstance(counts, Tensor):
            where = torch.arange(tokens, dtype=counts.dtype, device=counts.device)
            index = torch.searchsorted(counts, where, right=True)
        else:
            index = torch.repeat_interleave(
                torch.arange(self.experts, device=bias.device),
                torch.tensor(counts, device=bias.device),
            )
        return bias.index_select(0, index)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return one sharded tensor an expert, under the key that all its experts share."""
        found = {f"{prefix}weight": self._factory(f"{prefix}weight", self.weight, sharded_offsets)}
        if self.bias is not None:
            found[f"{prefix}bias"] = self._factory(f"{prefix}bias", self.bias, sharded_offsets)
        return found

    def _factory(self, key: str, parameter: Tensor, offsets: tuple[Any, ...]) -> Any:  # noqa: ANN401
        tp, size = self.tp_group.rank(), self.tp_group.size()
        first, total = self.ep_group.rank() * self.experts, self.ep_group.size() * self.experts
        prepended = len(offsets) + 1
        matrix = parameter.dim() == 3
        shared = matrix or self.split == 0
        blocks = self.blocks if self.split == 0 else 1

        def build(key: str, data: Tensor, replica: Any, _: object) -> list[ShardedTensor]:  # noqa: ANN401
            parts = []
            for expert in range(self.experts):
                for block, part in enumerate(data[expert].chunk(blocks, 0)):
                    where = [*offsets, (len(offsets), first + expert, total)]
                    if shared:
                        at, of = (tp + block * size, size * blocks)
                        where.append((prepended + (self.split if matrix else 0), at, of))
                    parts.append(
                        ShardedTensor.from_rank_offsets(
                            key, part, *where, replica_id=replica, prepend_axis_num=prepended
                        )
                    )
            return parts

        def merge(parts: list[Tensor]) -> Tensor:
            each = [torch.cat(parts[i : i + blocks]) for i in range(0, len(parts), blocks)]
            return torch.stack(each)

        replica = (0, 0 if shared else tp, self.dp_group.rank())
        return ShardedTensorFactory(key, parameter, build, merge, replica)


class GroupedMLP(MegatronModule):  # type: ignore[misc]
    """The experts of one layer that this rank holds; megatron's ExpertsInterface."""

    def __init__(
        self,
        num_local_experts: int,
        config: DecoderConfig,
        pg_collection: Any = None,  # noqa: ANN401
        name: str | None = None,
    ) -> None:
        super().__init__(config=config)
        moe = config.shape.moe
        assert moe is not None
        self.gated = bool(config.gated_linear_unit)
        width = divide(moe.ffn_hidden_size, pg_collection.expt_tp.size())
        blocks = 2 if self.gated else 1
        self.linear_fc1 = GroupedLinear(
            config,
            num_local_experts,
            config.hidden_size,
            width * blocks,
            pg_collection,
            split=0,
            blocks=blocks,
            bias=moe.linear_bias,
            init_method=config.init_method,
        )
        self.linear_fc2 = GroupedLinear(
            config,
            num_local_experts,
            width,
            config.hidden_size,
            pg_collection,
            split=1,
            blocks=1,
            bias=moe.linear_bias,
            init_method=config.output_layer_init_method,
        )

    def forward(
        self, x_TH: Tensor, tokens_per_expert: Tensor, probs_T: Tensor
    ) -> tuple[Tensor, None]:
        """Return each token's output of its expert times its probability, [T, H].

        Args:
            x_TH: Tokens, sorted by expert.
            tokens_per_expert: [E].
            probs_T: The router's weight of each token and expert.
        """
        return self.run(x_TH, tokens_per_expert.tolist(), probs_T), None

    def run(self, x_TH: Tensor, counts: Counts, probs_T: Tensor) -> Tensor:
        """Return what `forward` does, without a bias."""
        hidden = self.linear_fc1(x_TH, counts)
        if (bias := self.linear_fc1.token_bias(counts, len(x_TH))) is not None:
            hidden = hidden + bias
        probs_T1 = probs_T.unsqueeze(-1)
        if self.config.bias_activation_fusion:
            # keeps its input alone for the backward pass
            hidden = weighted_bias_swiglu_impl(hidden, None, probs_T1)
        else:
            hidden = (self._activate(hidden) * probs_T1).to(x_TH.dtype)
        out: Tensor = self.linear_fc2(hidden, counts)
        if (bias := self.linear_fc2.token_bias(counts, len(x_TH))) is not None:
            out = out + (bias * probs_T1).to(out.dtype)
        return out

    def _activate(self, x: Tensor) -> Tensor:
        config = self.config
        if not self.gated:
            activated: Tensor = config.activation_func(x)
            return activated
        gate, up = x.chunk(2, -1)
        limit = config.activation_func_clamp_value
        if limit is not None:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        if config.glu_linear_offset:
            up = up + config.glu_linear_offset
        scaled: Tensor = config.activation_func(gate) * up
        return scaled

    def backward_dw(self) -> None:
        """Nothing is delayed."""
