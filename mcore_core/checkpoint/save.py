"""Write checkpoints that are complete or are not checkpoints."""

import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.api import CheckpointException

from mcore_core.checkpoint import folders
from mcore_core.checkpoint.state import (
    Trainable,
    divides_state,
    gather_weights,
    metadata,
    sharded_state,
)
from mcore_core.config.checkpoint import CheckpointConfig
from mcore_core.errors import UsageError, usage_error

type Saved = Callable[[int, Path, float], None]
"""Called on every rank with step, folder and seconds once a checkpoint is complete."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, slots=True)
class Contents:
    """What goes into one checkpoint beside the sharded state."""

    step: int
    training: dict[str, Any]
    """For training.json; `step` and `time` are added."""
    common: dict[str, Any]
    """Small state that is the same on every rank (data cursor, recipe state)."""
    write_model: Callable[[Path], None] | None
    """Writes the model for other programs into the folder; collective."""


class Saver:
    """Saves the checkpoints of one run, in the background where asked to."""

    def __init__(self, run_dir: Path, options: CheckpointConfig, saved: Saved) -> None:
        self.run_dir, self.options, self._saved = run_dir, options, saved
        self._strategy: Any = TorchDistSaveShardedStrategy(
            cached_metadata=options.ckpt_assume_constant_structure
        )
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        if group.size() > 1:
            self._strategy = FullyParallelSaveStrategyWrapper(
                self._strategy, group, options.ckpt_assume_constant_structure
            )
        self._queue: AsyncCallsQueue | None = None
        if options.async_save:
            self._queue = AsyncCallsQueue(persistent=options.use_persistent_ckpt_worker)
        self.last_step: int | None = None
        """Step of the newest checkpoint written or under way."""

    def save(self, run: Trainable, contents: Contents) -> None:
        """Write one checkpoint; collective. With async_save it is complete only later.

        Raises:
            UsageError: The folder cannot be written, for example because the disk is full. What was
                written is removed; earlier checkpoints are untouched.
        """
        begin = time.monotonic()
        self.finish(blocking=True)  # one at a time: they complete in order
        gather_weights(run.chunks)
        partial_dir = folders.partial_path(self.run_dir, contents.step)
        with writing(partial_dir):
            if dist.get_rank() == 0:
                shutil.rmtree(partial_dir, ignore_errors=True)
                (partial_dir / folders.STATE).mkdir(parents=True)
            dist.barrier()
            if contents.write_model is not None:
                contents.write_model(partial_dir)
            request = self._write_state(run, contents, partial_dir / folders.STATE)
        self.last_step = contents.step
        facts = {
            folders.DIVIDED: divides_state(run.optimizer),
            folders.MOVED: sorted(run.moved),
        }
        contents = replace(contents, training={**facts, **contents.training})
        complete = partial(self._complete, contents, partial_dir, begin)
        if request is None:
            complete()
        else:
            assert self._queue is not None
            request.add_finalize_fn(complete)
            self._queue.schedule_async_request(request)

    def _write_state(self, run: Trainable, contents: Contents, folder: Path) -> Any:  # noqa: ANN401
        state = sharded_state(
            run, optimizer=not self.options.no_save_optim, rng=not self.options.no_save_rng
        )
        state["common"] = contents.common
        meta = {k: v for k, v in metadata().items() if k != "dp_cp_group"}
        return dist_checkpointing.save(
            state,
            str(folder),
            self._strategy,
            async_sharded_save=self._queue is not None,
            async_strategy="mcore",
            content_metadata=meta,
        )

    def _complete(self, contents: Contents, partial_dir: Path, begin: float) -> None:
        """Make the folder a checkpoint: training.json, flush, rename, then retention."""
        final = folders.final_path(self.run_dir, contents.step)
        with writing(partial_dir):
            dist.barrier()
            if dist.get_rank() == 0:
                training = {"step": contents.step, "time": time.time(), **contents.training}
                write_durably(
                    partial_dir / folders.TRAINING, json.dumps(training, indent=2, default=str)
                )
                _flush_tree(partial_dir)
                if final.exists():
                    shutil.rmtree(final)
                partial_dir.rename(final)
                _flush_folder(self.run_dir)
                folders.retain(self.run_dir, self.options.save_retain_interval)
            dist.barrier()
        self._saved(contents.step, final, time.monotonic() - begin)

    def finish(self, *, blocking: bool) -> None:
        """Complete what is written in the background; collective."""
        if self._queue is not None:
            partial_dir = folders.partial_path(self.run_dir, self.last_step or 0)
            with writing(partial_dir):
                self._queue.maybe_finalize_async_calls(blocking=blocking)

    def close(self) -> None:
        """Wait for what is under way and stop the background process."""
        if self._queue is not None:
            self.finish(blocking=True)
            self._queue.close()


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn what goes wrong while writing into one message, and leave nothing half-written."""
    try:
        yield
    except UsageError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    # torch's CheckpointException is a BaseException
    except (OSError, CheckpointingException, CheckpointException, RuntimeError) as error:
        reason = _reason(error)
        if reason is None:
            raise
        shutil.rmtree(folder, ignore_errors=True)
        free = shutil.disk_usage(_existing(folder)).free / 2**20
        raise usage_error(
            "MC703",
            f"{folder.name.removeprefix('.partial-')} could not be written: {reason}",
            f"folder: {folder.parent} ({free:.0f} MiB free)",
            "earlier checkpoints are complete and usable with --load",
            "fix: free space or choose another --save; --save_retain_interval deletes old "
            "checkpoints, --no_save_optim makes them smaller",
        ) from error


def _reason(error: BaseException | None) -> str | None:
    """Return the words of the system error behind an exception; None where there is none."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        if isinstance(error, OSError) and error.errno is not None:
            return f"{os.strerror(error.errno)} (errno {error.errno})"
        error = error.__cause__ or error.__context__
    text = " ".join(str(e) for e in seen)
    for code in (*_FULL, errno.EACCES, errno.EROFS):
        if os.strerror(code) in text:
            return f"{os.strerror(code)} (errno {code})"
    # torch's zip writer tells a failed write only by its text, a writing process not even that
    signs = ("PytorchStreamWriter", "unexpected pos", "Worker failure")
    if any(sign in text for sign in signs):
        return "a write failed, most likely because the disk is full"
    return None


def _existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder


def write_durably(path: Path, text: str) -> None:
    """Write a file and wait until the disk has it."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _flush_tree(folder: Path) -> None:
    """Wait until the disk has every file below a folder: a rename must not overtake the data."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
