"""Products of float32 matrices by oneDNN, on processors for which MKL has no AVX-512 kernels.

torch multiplies float32 matrices with MKL wherever it was built with it. On other processors than
Intel's MKL uses AVX2 alone: 105 against 230 GFLOP/s on one core of an AMD EPYC (torch 2.11), and
more for the thin products of adapters. oneDNN, which torch brings too, uses AVX-512 on all of them.
"""

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LEAST = 2**21
"""Multiplications from which a call of oneDNN, which takes about 20 us longer, is worth it."""

_library: Any = None


def patch_matmul() -> None:
    """Use oneDNN for products of large matrices where that is faster; the same on every run."""
    global _library
    if _library is None and mkl_is_slow():
        registry: Any = torch.library
        _library = registry.Library("aten", "IMPL")
        with warnings.catch_warnings():  # torch says that the operator had a kernel before
            warnings.simplefilter("ignore")
            _library.impl("mm", product, "CPU", allow_override=True)


def mkl_is_slow() -> bool:
    """Return whether torch uses MKL on a processor with AVX-512 that is not Intel's."""
    backends: Any = torch.backends
    if sys.platform != "linux" or not backends.mkl.is_available():
        return False
    if not backends.mkldnn.is_available():
        return False
    if backends.cpu.get_cpu_capability() != "AVX512":
        return False
    return "GenuineIntel" not in Path("/proc/cpuinfo").read_text(encoding="utf-8")


def product(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """Return a b, [M, N]."""
    rows, inner = a_MK.shape
    columns = b_KN.shape[1]
    if (
        rows * inner * columns >= LEAST
        and a_MK.dtype is torch.float32 is b_KN.dtype
        and _plain(a_MK)
        and _plain(b_KN)
    ):
        made: Tensor = torch.ops.mkldnn._linear_pointwise(a_MK, b_KN.t(), None, "none", [], "")
        return made
    out = a_MK.new_empty(rows, columns)
    torch.ops.aten.mm.out(a_MK, b_KN, out=out)  # another operator: it is not replaced
    return out


def _plain(matrix: Tensor) -> bool:
    """Return whether rows, or columns, stand one after another without overlap."""
    (rows, columns), (down, across) = matrix.shape, matrix.stride()
    return (across == 1 and down >= columns) or (down == 1 and across >= rows)
