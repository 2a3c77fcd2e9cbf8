"""Memory that is given back for a while, with every tensor that looks into it left as it is.

Views of a storage stay valid: the storage itself is emptied, and filled again from the host.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mcore_core.model.names import unwrap


class Aside:
    """The storages of some tensors, of those that lie on the device.

    Args:
        tensors: Whose storages; views of one storage count once.
        device: Where they are now.
        keep: Their content is copied to the host; else it is zero when it comes back.
    """

    def __init__(self, tensors: Iterable[Tensor], device: torch.device, *, keep: bool) -> None:
        self._storages = storages(tensors, device)
        self._keep, self._device = keep, device
        self._host: dict[int, torch.UntypedStorage] = {}
        self._sizes: dict[int, int] = {}

    def leave(self) -> None:
        """Give the memory back; nothing where it has been."""
        if self._sizes:
            return
        for key, storage in self._storages.items():
            self._sizes[key] = storage.nbytes()
            if self._keep:
                if key not in self._host:
                    pinned = self._device.type == "cuda"
                    host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=pinned)
                    self._host[key] = host.untyped_storage()
                self._host[key].copy_(storage)
        for storage in self._storages.values():
            storage.resize_(0)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def come_back(self) -> None:
        """Take it again; nothing where it is there."""
        for key, storage in self._storages.items():
            if key in self._sizes:
                storage.resize_(self._sizes[key])
                if self._keep:
                    storage.copy_(self._host[key])
                else:
                    torch.empty(0, dtype=torch.uint8, device=self._device).set_(storage).zero_()
        self._sizes = {}


def storages(tensors: Iterable[Tensor], device: torch.device) -> dict[int, torch.UntypedStorage]:
    """Return the storages of tensors on a device, each once, by their address."""
    found: dict[int, torch.UntypedStorage] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if tensor.device.type == device.type and storage.nbytes():
            found.setdefault(storage.data_ptr(), storage)
    return found


def weights_of(chunks: Sequence[Any]) -> Iterator[Tensor]:
    """Yield the parameters of the policy."""
    for chunk in chunks:
        for parameter in unwrap(chunk).parameters():
            yield parameter.data


def gradients_of(chunks: Sequence[Any]) -> Iterator[Tensor]:
    """Yield the gradients' buffers."""
    for chunk in chunks:
        for name in ("buffers", "expert_parallel_buffers"):
            buffers = getattr(chunk, name, ())
            for buffer in buffers if isinstance(buffers, list) else ():
                if buffer.grad_data is not None:
                    yield buffer.grad_data


def state_of(optimizer: Any) -> Iterator[Tensor]:  # noqa: ANN401
    """Yield the tensors of megatron's optimizer: what it keeps, and its own copies of weights."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = getattr(part, "optimizer", None)
        if inner is None:
            continue
        for group in inner.param_groups:
            yield from (p.data for p in group["params"])
        for state in inner.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))
