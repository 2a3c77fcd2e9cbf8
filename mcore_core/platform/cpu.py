"""The CPU platform: megatron-core on CPU tensors and gloo.

One rule: give a meaning only to calls that would *raise* without CUDA (`torch.cuda.*`,
`device="cuda"`, `.cuda()`). A call that works keeps its behaviour, and `torch.cuda.is_available()`
stays False, so other libraries still see a CPU machine. Two exceptions: `torch.compile` becomes the
identity, since a bare `@torch.compile` in megatron imports dynamo and inductor, for seconds; and
where MKL is slow large matrices are multiplied by oneDNN (platform/cpu_matmul.py).
"""

import os
import resource
import sys
from typing import Literal

import torch

from mcore_core.platform.cpu_collectives import patch_collectives
from mcore_core.platform.cpu_matmul import patch_matmul
from mcore_core.platform.cpu_megatron import hide_gpu_packages, stub_jit
from mcore_core.platform.cpu_torch import patch_compile, patch_cuda, patch_devices, patch_type_names


class CpuPlatform:
    """Every rank on the host."""

    name: Literal["cpu", "cuda"] = "cpu"
    backend: Literal["gloo", "nccl"] = "gloo"

    def install(self) -> None:
        """Patch torch; megatron itself is patched by `compat.apply()` after its import."""
        patch_cuda()
        patch_devices()
        patch_type_names()
        patch_collectives()
        hide_gpu_packages()
        stub_jit()
        patch_compile()
        patch_matmul()

    def set_device(self, local_rank: int) -> torch.device:
        """There is one device."""
        return self.device()

    def device(self) -> torch.device:
        """Return the CPU."""
        return torch.device("cpu")

    def memory(self) -> int:
        """Return the peak resident memory of this process, in bytes."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

    def memory_total(self) -> int:
        """Return the machine's memory, in bytes."""
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def device_name(self) -> str:
        """Return how many cores there are."""
        return f"CPU, {os.cpu_count()} cores"
