"""The policy's weights as files, for servers to load: kept until the next ones, to be sent again.

Servers on this machine read them where they are; to others they are sent.
"""

import atexit
import fcntl
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

BUCKET = 256 * 2**20
"""Bytes of weights in one file, about."""
SHARED = Path("/dev/shm")
PREFIX = "mcore-weights-"


class WeightFolder:
    """A folder in memory where it has room, else on disk; it goes when the process ends.

    What a process that was killed has left in memory is removed.
    """

    def __init__(self, size: int) -> None:
        in_memory = SHARED.is_dir() and shutil.disk_usage(SHARED).free > 3 * size
        parent = SHARED if in_memory else Path(tempfile.gettempdir())
        _sweep(parent)
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        self._lock = (self.path / "lock").open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        atexit.register(self.close)

    def close(self) -> None:
        """Remove it."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()
        atexit.unregister(self.close)

    def fresh(self) -> Path:
        """Return an empty folder in it; what was there before is removed."""
        folder = self.path / "now"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder


def _sweep(parent: Path) -> None:
    for folder in parent.glob(f"{PREFIX}*"):
        try:
            with (folder / "lock").open("r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # it is in use, or another user's
            continue


def size_of(model: Path) -> int:
    """Return the bytes of a Hugging Face folder's weights."""
    return sum(file.stat().st_size for file in model.glob("*.safetensors"))


def write(
    tensors: "Iterator[tuple[str, Tensor]]", folder: Path | None, dtype: torch.dtype
) -> list[Path]:
    """Write tensors in buckets; without a folder they are only walked through.

    Args:
        tensors: Whole, by Hugging Face name; the iteration is collective.
        folder: Where to.
        dtype: What the servers hold: wider matrices are rounded to it here.
    """
    from safetensors.torch import save_file  # noqa: PLC0415

    found: list[Path] = []
    held: dict[str, Tensor] = {}
    size = 0

    def flush() -> None:
        nonlocal held, size
        assert folder is not None
        found.append(folder / f"part-{len(found):05}.safetensors")
        save_file(held, found[-1])
        held, size = {}, 0

    for name, tensor in tensors:
        if folder is None:
            continue
        held[name] = narrowed(tensor.detach(), dtype).to("cpu", copy=True).contiguous()
        size += held[name].numel() * held[name].element_size()
        if size >= BUCKET:
            flush()
    if held:
        flush()
    return found


def narrowed(tensor: "Tensor", dtype: torch.dtype) -> "Tensor":
    """Return a float32 matrix in a narrower type; what is not a matrix stays as it is."""
    if tensor.dtype is torch.float32 and tensor.dim() > 1 and dtype.is_floating_point:
        return tensor.to(dtype)
    return tensor
