"""Layer-wise optimizers (dist_muon) in float32.

megatron-core 0.19 wraps the optimizers of `LayerWiseDistributedOptimizer` for bfloat16 only; in
float32 it leaves torch's own, which have no loss scale, and the first step fails
(megatron/core/optimizer/layer_wise_optimizer.py, "Wrap base torch optimizers with Float16"). Its
checkpoints expect the layout of those wrappers, too.
"""

from collections.abc import Callable, Sequence
from typing import Any

from megatron.core import optimizer as megatron_optimizer
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
from megatron.core.optimizer.optimizer import FP32Optimizer


class Whole(FP32Optimizer):  # type: ignore[misc]
    """A float32 optimizer whose state lies where that of a bfloat16 one does: under "optimizer"."""

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # noqa: ANN401
        """Return the state, sharded as the model."""
        return {"optimizer": super().sharded_state_dict(*args, **kwargs)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it."""
        super().load_state_dict(state_dict["optimizer"])


class LayerWise(LayerWiseDistributedOptimizer):  # type: ignore[misc]
    """The same, with float32 weights too."""

    def __init__(
        self,
        optimizers: list[Any],
        config: Any,  # noqa: ANN401
        pg_collection: Any = None,  # noqa: ANN401
        init_state_fn_list: Sequence[Callable[..., None]] | None = None,
        model_chunks: list[Any] | None = None,
    ) -> None:
        self._wrapping = (config, init_state_fn_list)
        super().__init__(optimizers, config, pg_collection, init_state_fn_list, model_chunks)

    def shard_params(self, optimizers: list[Any], full_param_layouts: Any = None) -> None:  # noqa: ANN401
        """Leave each rank its parameters, then wrap what is not wrapped for bfloat16."""
        super().shard_params(optimizers, full_param_layouts)
        config, functions = self._wrapping
        if not config.bf16:
            optimizers[:] = [
                Whole(opt, config, functions[i] if functions else None)
                for i, opt in enumerate(optimizers)
            ]


def patch() -> None:
    """Let megatron build this one."""
    megatron_optimizer.LayerWiseDistributedOptimizer = LayerWise
