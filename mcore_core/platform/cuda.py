"""The CUDA platform: torch and megatron as they are, NCCL."""

from typing import Literal

import torch


class CudaPlatform:
    """One CUDA device a process."""

    name: Literal["cpu", "cuda"] = "cuda"
    backend: Literal["gloo", "nccl"] = "nccl"

    def install(self) -> None:
        """Nothing to prepare."""

    def set_device(self, local_rank: int) -> torch.device:
        """Choose the device with this process's local rank."""
        torch.cuda.set_device(local_rank)
        return self.device()

    def device(self) -> torch.device:
        """Return the chosen device."""
        return torch.device("cuda", torch.cuda.current_device())

    def memory(self) -> int:
        """Return the peak of allocated memory, in bytes."""
        return torch.cuda.max_memory_allocated()

    def memory_total(self) -> int:
        """Return the device's memory, in bytes."""
        return int(torch.cuda.get_device_properties(self.device()).total_memory)

    def device_name(self) -> str:
        """Return the device's name."""
        return torch.cuda.get_device_name(self.device())
