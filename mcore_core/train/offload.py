"""Weights that lie in host memory and come to the device while they are used."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from mcore_core.model.names import unwrap


class HostWeights:
    """The weights of frozen chunks, moved to (pinned) host memory when it is made.

    Args:
        chunks: Model chunks that do not train.
        device: Where they are used.
    """

    def __init__(self, chunks: Sequence[Any], device: torch.device) -> None:
        self.device, self._inside = device, 0
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        for chunk in chunks:
            model = unwrap(chunk)
            for tensor in (*model.parameters(), *model.buffers()):
                host = tensor.data.to("cpu", copy=True)
                self._kept.append((tensor, host.pin_memory() if device.type == "cuda" else host))
        self._leave()

    @contextmanager
    def resident(self) -> Iterator[None]:
        """Have the weights on the device for a while; may be nested."""
        if not self._inside:
            for tensor, host in self._kept:
                tensor.data = host.to(self.device, non_blocking=True, copy=True)
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                self._leave()

    def _leave(self) -> None:
        for tensor, host in self._kept:
            tensor.data = host
