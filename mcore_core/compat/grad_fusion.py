"""Build an output layer while Transformer Engine's layers fuse gradient accumulation.

megatron-core 0.19 (tensor_parallel/layers.py, ColumnParallelLinear.__init__) refuses
`gradient_accumulation_fusion` without Apex's extension, also where only Transformer Engine's
layers, which bring their own kernel, would use it. The one plain ColumnParallelLinear beside
them is the output layer, and the head computes its gradient itself.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def without_apex() -> Iterator[None]:
    """Let ColumnParallelLinear be built; it must not run its own backward pass."""
    from megatron.core.tensor_parallel import layers  # noqa: PLC0415  (after the platform)

    module: Any = layers
    available = module._grad_accum_fusion_available
    module._grad_accum_fusion_available = True
    try:
        yield
    finally:
        module._grad_accum_fusion_available = available
