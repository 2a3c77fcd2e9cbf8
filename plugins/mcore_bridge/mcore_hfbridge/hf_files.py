"""The safetensors files of a checkpoint folder, known from their headers, read by slices."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from mcore_core.errors import Problem, UsageError, usage_error
from mcore_core.model.weight_files import AGAIN, INDEX, file_names, read_header
from mcore_hfbridge import mxfp4
from mcore_hfbridge.fp8 import dequantized, read_block

if TYPE_CHECKING:
    from torch import Tensor

    from mcore_core.model.family import Shape

MXFP4 = "MXFP4"
PREFIX = "model."
"""Of all tensors of a model but those of its head."""
FLOATS = ("F64", "F32", "F16", "BF16")
"""The dtypes that can be read as they are."""
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, MXFP4: 4}
"""Bytes an element of the dtypes that can be read; fp8 only with scales, mxfp4 as float32."""
SCALE = "_scale_inv"
"""What the name of an fp8 weight's block scales adds to its own."""


@dataclass(frozen=True, slots=True)
class HFTensor:
    """What a header says of one tensor."""

    name: str
    file: str
    dtype: str
    """As safetensors spells it: F32, BF16."""
    shape: "Shape"
    scale: str = ""
    """Name of its block scales, where it is fp8 or mxfp4."""
    stored: str = ""
    """Its name in the file, where that is another."""


@dataclass(slots=True)
class HFFiles:
    """All tensors of a folder."""

    folder: Path
    tensors: Mapping[str, HFTensor]
    scales: frozenset[str] = frozenset()
    """Tensors that are block scales of others, or their packed blocks."""
    block: "Shape" = ()
    """Rows and columns that share one scale."""
    _open: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def scan(cls, folder: Path, file: str | None = None) -> "HFFiles":
        """Read every header, or that of one file.

        Raises:
            UsageError: Naming each file that is missing or damaged.
        """
        names, listed = file_names(folder) if file is None else ([file], None)
        tensors: dict[str, HFTensor] = {}
        problems: list[Problem] = []
        for name in names:
            try:
                header = read_header(folder / name)
            except UsageError as error:
                problems += error.problems
                continue
            for tensor, entry in header.items():
                if tensor in tensors:
                    problems.append(
                        Problem(
                            "MC523",
                            f"{folder} holds the tensor {tensor!r} twice, "
                            f"in {tensors[tensor].file} and in {name}",
                            [AGAIN],
                        )
                    )
                shape = tuple(entry["shape"])
                tensors[tensor] = HFTensor(tensor, name, entry["dtype"], shape)
        problems += [] if problems else _check_index(folder, listed, tensors)
        if problems:
            raise UsageError(problems)
        tensors = _with_prefix(tensors)
        scaled = {
            name: replace(tensor, scale=name + SCALE)
            for name, tensor in tensors.items()
            if tensor.dtype == "F8_E4M3" and name + SCALE in tensors
        }
        block = read_block(folder) if scaled else ()
        packed = _packed(tensors)
        parts = [tensor.scale for tensor in (*scaled.values(), *packed.values())]
        scales = frozenset((*parts, *(name + mxfp4.BLOCKS for name in packed)))
        return cls(folder, tensors | scaled | packed, scales, block)

    @contextmanager
    def reading(self) -> "Iterator[HFFiles]":
        """Keep files open while reading; they are memory-mapped."""
        try:
            yield self
        finally:
            self._open.clear()

    def read(self, name: str, slices: tuple[slice, ...]) -> "Tensor":
        """Return one box of a tensor, on the CPU, in the file's dtype; fp8 and mxfp4 as float32."""
        if self.tensors[name].dtype == MXFP4:
            blocks, scales = name + mxfp4.BLOCKS, self.tensors[name].scale
            return mxfp4.unpacked(slices, partial(self._read, blocks), partial(self._read, scales))
        box = self._read(name, slices)
        scale = self.tensors[name].scale
        return dequantized(box, slices, self.block, partial(self._read, scale)) if scale else box

    def _read(self, name: str, slices: tuple[slice, ...]) -> "Tensor":
        file, stored = self.tensors[name].file, self.tensors[name].stored or name
        try:
            if file not in self._open:
                self._open[file] = safe_open(self.folder / file, framework="pt", device="cpu")
            box: Tensor = self._open[file].get_slice(stored)[slices]
        except (SafetensorError, OSError) as error:
            raise usage_error(
                "MC522", f"{self.folder / file} cannot be read at {name!r}: {error}", AGAIN
            ) from error
        return box


def _with_prefix(tensors: dict[str, HFTensor]) -> dict[str, HFTensor]:
    """Return the tensors as a language model names them: a bare one is saved without `model.`."""
    if "embed_tokens.weight" not in tensors or any(n.startswith(PREFIX) for n in tensors):
        return tensors
    return {
        PREFIX + name: replace(tensor, name=PREFIX + name, stored=name)
        for name, tensor in tensors.items()
    }


def _packed(tensors: Mapping[str, HFTensor]) -> dict[str, HFTensor]:
    """Return what the blocks and scales of mxfp4 among the tensors stand for."""
    found = {}
    for blocks in tensors.values():
        name = blocks.name.removesuffix(mxfp4.BLOCKS)
        scales = tensors.get(name + mxfp4.SCALES)
        if name == blocks.name or scales is None or {blocks.dtype, scales.dtype} != {"U8"}:
            continue
        if shape := mxfp4.shape_of(blocks.shape, scales.shape):
            found[name] = HFTensor(name, blocks.file, MXFP4, shape, scales.name)
    return found


def _check_index(
    folder: Path, listed: Mapping[str, str] | None, tensors: Mapping[str, HFTensor]
) -> list[Problem]:
    return [
        Problem(
            "MC523", f"{folder / INDEX} lists {name!r} in {file}, which does not hold it", [AGAIN]
        )
        for name, file in sorted((listed or {}).items())
        if name not in tensors or tensors[name].file != file
    ]
