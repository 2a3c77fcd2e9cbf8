"""Start the processes of a run on this machine through torchrun, and tell how they ended.

The command itself stays small: it starts an agent (torchrun's own, in a process of its own), hands
it SIGTERM in a way that lets ranks save first, and prints what ranks left as their error.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mcore_core.errors import usage_error

if TYPE_CHECKING:
    from types import FrameType

    from mcore_core.config.distributed import DistributedConfig

ERRORS = "MCORE_ERROR_DIR"
"""Environment variable: the folder into which a rank writes its error for the launcher."""


def wanted(options: "DistributedConfig") -> bool:
    """Return whether this process is to start ranks: asked to, and not itself one of them."""
    started = "RANK" in os.environ or int(os.environ.get("SLURM_NTASKS", "1")) > 1
    several = (options.nproc_per_node or 1) > 1 or options.nnodes > 1
    return several and not started


def launch(options: "DistributedConfig", argv: Sequence[str]) -> int:
    """Run `mcore` with these arguments on every rank; return the exit code."""
    address, port = _meeting_point(options)
    with tempfile.TemporaryDirectory(prefix="mcore-launch-") as folder:
        env = dict(os.environ)
        env[ERRORS] = folder
        env.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // (options.nproc_per_node or 1))))
        command = [
            sys.executable,
            "-P",  # as for the command itself: the folder it is started in is not searched
            "-m",
            "mcore_core.launch.agent",
            json.dumps(
                {
                    "nproc_per_node": options.nproc_per_node or 1,
                    "nnodes": options.nnodes,
                    "node_rank": options.node_rank,
                    "master_addr": address,
                    "master_port": port,
                }
            ),
            *argv,
        ]
        agent = subprocess.Popen(command, env=env)
        code = _wait(agent)
        _print_errors(Path(folder), code)
    return code


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _meeting_point(options: "DistributedConfig") -> tuple[str, int]:
    address = options.master_addr or "127.0.0.1"
    if options.nnodes > 1 and options.master_addr is None and options.node_rank > 0:
        raise usage_error(
            "MC620",
            f"--nnodes {options.nnodes} needs the address of machine 0",
            "fix: --master_addr HOST on every machine",
        )
    if options.master_port is None and options.nnodes == 1:
        return address, _free_port()
    port = options.master_port or 29500
    if options.node_rank == 0:
        check_port(address if options.nnodes > 1 else "127.0.0.1", port)
    return address, port


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def check_port(address: str, port: int) -> None:
    """Raise a UsageError where another program listens on the port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise usage_error(
                "MC621",
                f"port {port} on {address} is in use ({os.strerror(error.errno or 0)})",
                "another run, or another program, listens there",
                "fix: --master_port with a free one, or leave it out for a run on one machine",
            ) from error


def _wait(agent: "subprocess.Popen[bytes]") -> int:
    """Wait for the agent; pass signals to the ranks, which save and end in good order."""

    def forward(number: int, _: "FrameType | None") -> None:
        ranks = _children(agent.pid)
        for pid in ranks or [agent.pid]:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    previous = signal.signal(signal.SIGTERM, forward)
    try:
        while True:
            try:
                return agent.wait()
            except KeyboardInterrupt:  # the terminal sent it to the ranks too
                continue
    finally:
        signal.signal(signal.SIGTERM, previous)


def _children(pid: int) -> list[int]:
    """Return the child processes of a process, where /proc tells."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    return [int(word) for word in text.split()]


def _print_errors(folder: Path, code: int) -> None:
    seen: list[str] = []
    for path in sorted(folder.glob("rank*"), key=lambda p: int(p.name.removeprefix("rank"))):
        text = path.read_text(encoding="utf-8").rstrip()
        if text and text not in seen:
            seen.append(text)
            who = "" if path.name == "rank0" else f"[{path.name.replace('rank', 'rank ')}] "
            sys.stderr.write(f"{who}{text}\n")
    if code and not seen:
        sys.stderr.write(f"error[MC622]: the run ended with exit code {code}\n")


def leave_error(text: str, rank: int) -> None:
    """Hand this rank's error to the launcher; without one, print it."""
    folder = os.environ.get(ERRORS)
    if folder is None or not Path(folder).is_dir():
        who = f"[rank {rank}] " if rank else ""
        sys.stderr.write(f"{who}{text}\n")
        return
    temporary = Path(folder) / f".rank{rank}.{time.monotonic_ns()}"
    temporary.write_text(text, encoding="utf-8")
    temporary.rename(Path(folder) / f"rank{rank}")
