"""Writes a safetensors file piece by piece, so that it is never in memory whole."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import torch

if TYPE_CHECKING:
    from mcore_core.model.family import Shape

NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
ALIGNMENT = 8
"""Of the data's start in the file."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file."""

    name: str
    dtype: torch.dtype
    shape: "Shape"

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return prod(self.shape) * self.dtype.itemsize


def file_order(entries: Sequence[Entry]) -> list[Entry]:
    """Return the order in which data lies in a file: wide types first, so that all are aligned."""
    return sorted(entries, key=lambda e: -e.dtype.itemsize)


@dataclass(slots=True)
class Writer:
    """One file, written in the order of its entries."""

    path: Path
    entries: Sequence[Entry]
    _file: "BinaryIO | None" = None
    _at: int = field(default=0, init=False)
    _rows: int = field(default=0, init=False)
    """Of the next tensor, that are written."""

    def write(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write the next tensors, or the next rows of one; on the CPU. Raises OSError."""
        if self._file is None:
            self._file = self.path.open("wb")
            self._file.write(header(self.entries))
        for name, tensor in tensors.items():
            entry = self.entries[self._at]
            self._rows += tensor.shape[0]
            found = (name, tensor.dtype, tuple(tensor.shape[1:]))
            expected = (entry.name, entry.dtype, entry.shape[1:])
            assert found == expected, f"{found} in place of {entry}"
            assert self._rows <= entry.shape[0], f"{self._rows} rows of {entry}"
            data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
            self._file.write(memoryview(data.numpy()))
            if self._rows == entry.shape[0]:
                self._at, self._rows = self._at + 1, 0

    def close(self) -> None:
        """Close the file. Raises OSError."""
        if self._file is not None:
            self._file.close()
            self._file = None


def header(entries: Sequence[Entry]) -> bytes:
    """Return what stands before the data of a safetensors file."""
    described: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        start, end = end, end + entry.nbytes
        described[entry.name] = {
            "dtype": NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
