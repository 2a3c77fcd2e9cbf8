"""What the kernel asks of a platform."""

from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import torch


class Platform(Protocol):
    """A kind of device."""

    name: Literal["cpu", "cuda"]
    backend: Literal["gloo", "nccl"]

    def install(self) -> None:
        """Prepare torch, before megatron is imported."""

    def set_device(self, local_rank: int) -> "torch.device":
        """Choose this process's device."""

    def device(self) -> "torch.device":
        """Return the chosen device."""

    def memory(self) -> int:
        """Return the peak memory of this process's device since the start, in bytes."""

    def memory_total(self) -> int:
        """Return the memory of this process's device, in bytes."""

    def device_name(self) -> str:
        """Return the device's name, for reports."""
