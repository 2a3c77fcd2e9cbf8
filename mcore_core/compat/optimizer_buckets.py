"""Save the distributed optimizer's state where a rank's buffer has several buckets.

megatron-core 0.19.2 (optimizer/distrib_optimizer.py) puts the buckets of a buffer end to end in
`get_parameter_state_dp_zero`, without the padding between them, and cuts parameters out of it in
`sharded_param_state_fully_reshardable` by offsets that count the padding ("this is a bug in the
param ranges logic", issue 504 there). Every parameter behind the first padded bucket is saved
wrong: under pipeline parallelism with tied embeddings, which have a bucket of their own, and with
overlap_grad_reduce as soon as a model has more than one bucket.

The patch puts the buckets where the offsets say. Where there is one bucket nothing changes, so
checkpoints of before are read as they were. Not needed once megatron-core saves them alike:
tests/parity/test_checkpoint_layouts.py::test_the_optimizer_patch_is_needed then fails.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any


def patch() -> None:
    """Replace the method of megatron's distributed optimizer."""
    from megatron.core.optimizer.distrib_optimizer import (  # noqa: PLC0415  (after the platform)
        DistributedOptimizer,
    )

    original = DistributedOptimizer.get_parameter_state_dp_zero
    if not hasattr(original, "__wrapped__"):
        DistributedOptimizer.get_parameter_state_dp_zero = _placed(original)


def _placed(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def get_parameter_state_dp_zero(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        state = original(self, *args, **kwargs)
        for index, buffer in enumerate(self.buffers if state is not None else ()):
            if len(buffer.buckets) == 1:
                continue
            for tensors in state[index].values():
                for name, values in tensors.items():
                    if name != "numel_unpadded":
                        tensors[name] = _with_padding(values, buffer)
        return state

    return get_parameter_state_dp_zero


def _with_padding(values: Any, buffer: Any) -> Any:  # noqa: ANN401
    """Return the buckets' values at the offsets that the buckets have in the buffer."""
    placed = values.new_zeros(buffer.numel)
    taken = 0
    for bucket in buffer.buckets:
        size = bucket.numel_unpadded
        placed[bucket.offset : bucket.offset + size] = values[taken : taken + size]
        taken += size
    return placed
