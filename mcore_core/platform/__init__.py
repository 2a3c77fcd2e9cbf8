"""What device this process runs on. Nothing else in the kernel asks.

`install()` picks the platform, once, before megatron is imported: with a usable CUDA device it
touches nothing; without one it makes megatron-core run on CPU tensors and gloo (platform/cpu*.py).
"""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mcore_core.platform.base import Platform

_current: "Platform | None" = None


def install() -> "Platform":
    """Choose the platform of this process and prepare torch for it. Later calls return the same."""
    global _current
    if _current is None:
        import torch  # noqa: PLC0415  (the first torch import of a run)

        if "megatron.core" in sys.modules and not torch.cuda.is_available():
            raise RuntimeError("mcore_core.platform.install() must run before megatron is imported")
        if torch.cuda.is_available():
            from mcore_core.platform.cuda import CudaPlatform  # noqa: PLC0415

            _current = CudaPlatform()
        else:
            from mcore_core.platform.cpu import CpuPlatform  # noqa: PLC0415

            _current = CpuPlatform()
        _current.install()
    return _current
