"""Run a function on N forked ranks over gloo: import once, fork many times, a second a case."""

import gc
import importlib
import json
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any


class RankError(AssertionError):
    """A rank failed; the message holds its traceback."""


def fork_ranks[R](function: Callable[[int], R], world: int, *, timeout: float = 120) -> list[R]:
    """Return `function(rank)` of every rank, in order.

    Each rank is a fork of this process with RANK and WORLD_SIZE set and torch.distributed joined
    through a file; megatron's groups are the function's business. On a failure the remaining ranks
    are killed and RankError raised. What rank 0 imports is then imported here, for the next forks.

    Args:
        function: Called in the child; its result must be picklable.
        world: Number of ranks.
        timeout: Seconds before all are killed, with the stacks of those still running.
    """
    from mcore_core import compat  # noqa: PLC0415  (imports megatron, before the fork)

    compat.apply()
    folder = Path(tempfile.mkdtemp(prefix="mcore-ranks-"))
    sys.stdout.flush()
    sys.stderr.flush()
    pids = {rank: _fork(function, rank, world, folder, timeout) for rank in range(world)}
    try:
        _wait(pids, folder, timeout)
        results = [_result(folder, rank) for rank in range(world)]
        _import(json.loads((folder / "modules").read_text()))
    finally:
        for pid in pids.values():
            _kill(pid)
        shutil.rmtree(folder, ignore_errors=True)
    return results


def _import(names: Iterable[str]) -> None:
    """Import modules that a rank needed; what cannot be imported here is left to the ranks."""
    for name in names:
        with suppress(Exception):
            importlib.import_module(name)


def _fork(
    function: Callable[[int], Any], rank: int, world: int, folder: Path, timeout: float
) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        code = _child(function, rank, world, folder, timeout)
    finally:
        os._exit(code)


def _child(
    function: Callable[[int], Any], rank: int, world: int, folder: Path, timeout: float
) -> int:
    gc.freeze()  # else the first collection copies all memory that the ranks share
    import faulthandler  # noqa: PLC0415

    import torch  # noqa: PLC0415
    import torch.distributed as dist  # noqa: PLC0415

    log = os.open(folder / f"log{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    stack = open(folder / f"stack{rank}", "w", encoding="utf-8")  # noqa: SIM115  (for the handler)
    faulthandler.dump_traceback_later(max(1.0, timeout - 2), file=stack)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    before, code = set(sys.modules), 0
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
        )
        outcome: tuple[str, Any] = ("ok", function(rank))
    except BaseException:
        outcome, code = ("error", traceback.format_exc()), 1
    if rank == 0:
        new = [name for name in list(sys.modules) if name not in before]
        (folder / "modules").write_text(json.dumps(new))
    part = folder / f"part{rank}"
    part.write_bytes(pickle.dumps(outcome))
    part.rename(folder / f"out{rank}")
    return code


def _wait(pids: dict[int, int], folder: Path, timeout: float) -> None:
    end, running, grace = time.monotonic() + timeout, dict(pids), None
    while running:
        for rank, pid in list(running.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                del running[rank], pids[rank]
                if status and grace is None:
                    grace = time.monotonic() + 2  # let the others tell their part
        if grace is not None and time.monotonic() > grace:
            break
        if time.monotonic() > end:
            stacks = "\n".join((folder / f"stack{r}").read_text()[:4000] for r in running)
            raise RankError(f"ranks {sorted(running)} still ran after {timeout} s\n{stacks}")
        time.sleep(0.01)
    errors = [e for rank in range(1000) if (e := _error(folder, rank)) is not None]
    if errors:
        raise RankError("\n".join(errors))


def _error(folder: Path, rank: int) -> str | None:
    if not (folder / f"log{rank}").exists():
        return None
    out = folder / f"out{rank}"
    if not out.exists():
        return f"rank {rank} died: {(folder / f'log{rank}').read_text()[-3000:]}"
    kind, value = pickle.loads(out.read_bytes())
    return f"rank {rank}: {value}" if kind == "error" else None


def _result(folder: Path, rank: int) -> Any:  # noqa: ANN401
    return pickle.loads((folder / f"out{rank}").read_bytes())[1]


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):
        pass
