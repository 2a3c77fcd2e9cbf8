"""Megatron's MoELayer over packed rows: the router knows which sequence each token is of."""

from typing import Any

from megatron.core import tensor_parallel
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from mcore_core.model.config import DecoderConfig
from mcore_core.model.moe.allgather import UnevenAllGather


class PackedMoELayer(MoELayer):  # type: ignore[misc]
    """MoELayer whose `padding_mask` is the sequence of each token, from 1, and 0 for padding."""

    def __init__(self, config: DecoderConfig, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(config, *args, **kwargs)
        if config.moe_token_dispatcher_type == "allgather":
            groups = kwargs["pg_collection"]
            self.token_dispatcher = UnevenAllGather(
                self.num_local_experts, self.local_expert_indices, config, groups
            )

    def forward(
        self,
        hidden_states: Tensor,
        intermediate_tensors: object = None,
        padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Return the layer's output [T, 1, H], and no bias.

        Args:
            hidden_states: [T, 1, H] of this rank's tokens.
            intermediate_tensors: Not used.
            padding_mask: [1, T].
        """
        if self.moe_layer_recompute and self.training:
            out = tensor_parallel.checkpoint(self._run, False, hidden_states, padding_mask)
        else:
            out = self._run(hidden_states, padding_mask)
        assert isinstance(out, Tensor)
        return out, None

    def _run(self, hidden_states: Tensor, sequence_1T: Tensor | None) -> Tensor:
        shared = self.shared_experts_compute(hidden_states)
        sequence_T1 = None if sequence_1T is None else sequence_1T.transpose(0, 1)
        probs, routed = self.route(hidden_states, sequence_T1)
        tokens, probs = self.preprocess(hidden_states, probs, routed)
        tokens, probs = self.dispatch(tokens, probs)
        out, _ = self.routed_experts_compute(tokens, probs)
        out = self.combine(out)
        result: Tensor = self.postprocess(out, shared)
        return result
