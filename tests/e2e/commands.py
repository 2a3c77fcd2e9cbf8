"""Run the `mcore` command in forks of this process: torch is imported once, a run takes seconds."""

import contextlib
import gc
import importlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Ran:
    """How a command ended."""

    code: int
    """Exit code, or minus the signal that killed it."""
    out: str
    err: str
    seconds: float

    def folder(self):
        """The run folder, as the command printed it."""
        lines = [line.split() for line in self.err.splitlines() + self.out.splitlines()]
        return Path(next(words[1] for words in lines if words[:1] == ["output"]))


@dataclass
class Child:
    """A command that runs in a fork."""

    pid: int
    log: Path
    started: float = field(default_factory=time.monotonic)

    @property
    def err(self):
        return self.log.with_suffix(".err").read_text(errors="replace")

    @property
    def out(self):
        return self.log.with_suffix(".out").read_text(errors="replace")

    def alive(self):
        """False once the command has ended; `wait` is still to be called then."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def kill(self, number=signal.SIGKILL):
        os.kill(self.pid, number)

    def sweep(self):
        """Kill what the command may have left running."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def wait(self, timeout=120):
        end = time.monotonic() + timeout
        while True:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                seconds = time.monotonic() - self.started
                self.sweep()
                _import_too(self.log.with_suffix(".modules"))
                return Ran(os.waitstatus_to_exitcode(status), self.out, self.err, seconds)
            if time.monotonic() > end:
                self.sweep()
                os.waitpid(self.pid, 0)
                raise AssertionError(f"still running after {timeout} s\n{self.err[-3000:]}")
            time.sleep(0.02)


class Commands:
    """Starts commands in forks of this process, with logs in `folder`."""

    def __init__(self, folder):
        self.folder, self.count = folder, 0
        folder.mkdir(parents=True, exist_ok=True)
        _import()

    def start(self, argv, *, env=None, before=None):
        """Fork; `before` is called in the child."""
        self.count += 1
        log = self.folder / f"{self.count:03d}"
        for suffix in (".out", ".err"):
            log.with_suffix(suffix).touch()
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            _child([str(a) for a in argv], log, env or {}, before)
        return Child(pid, log)

    def __call__(self, *argv, env=None, before=None, timeout=120):
        """Run a command to its end."""
        return self.start(argv, env=env, before=before).wait(timeout)

    def ranks(self, world, *argv, env=None, timeout=120, each=None):
        """Run a command as `world` ranks, as under an outer torchrun; return rank 0's end.

        `each` is called in every rank.
        """
        shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        shared["MASTER_PORT"] = str(free_port())
        children = [
            self.start(
                argv,
                env={**shared, "RANK": str(r), "LOCAL_RANK": str(r), **(env or {})},
                before=each,
            )
            for r in range(world)
        ]
        ends = [child.wait(timeout) for child in children]
        assert {end.code for end in ends} == {ends[0].code}, [end.err[-2000:] for end in ends]
        return ends[0]


def _import():
    from mcore_core import compat

    compat.apply()
    import mcore_core.train.loop  # noqa: F401
    from mcore_core.report import tensorboard  # noqa: F401


ALONE = {"wandb", "swanlab"}
"""Packages that start threads or read their settings as they are imported."""


def _import_too(names):
    """Import what a command has needed, for the forks to come."""
    if names.exists():
        for name in names.read_text().split():
            if name not in sys.modules and name.partition(".")[0] not in ALONE:
                with contextlib.suppress(Exception):
                    importlib.import_module(name)


def _child(argv, log, env, before):
    code = 99
    gc.freeze()  # else the first collection copies all memory that the forks share
    try:
        os.setpgid(0, 0)
        for number, suffix in ((1, ".out"), (2, ".err")):
            os.dup2(os.open(log.with_suffix(suffix), os.O_WRONLY | os.O_APPEND), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", closefd=False, buffering=1)  # noqa: SIM115
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)
        os.environ.update(env)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if before is not None:
            before()
        from mcore_core.cli.main import main

        known = set(sys.modules)
        code = main(argv)
        sys.stdout.flush()
        sys.stderr.flush()
        names = [name for name in list(sys.modules) if name not in known]
        log.with_suffix(".modules").write_text("\n".join(names))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def metrics(run):
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run):
    """The loss of each step, by step."""
    return {line["step"]: line["loss"] for line in metrics(run) if "loss" in line}


def until(condition, timeout=60):
    """Wait for something, and return it."""
    end = time.monotonic() + timeout
    while not (found := condition()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)
    return found


def refused(ran, *texts):
    """The command ended with exit code 2 and a message that holds the texts, no traceback."""
    assert ran.code == 2, (ran.code, ran.err)
    for text in texts:
        assert text in ran.err
    assert "Traceback" not in ran.err
    assert ran.err.count("error[") == 1, ran.err


STEPS = ["--train_iters", 6, "--save_interval", 3, "--log_interval", 1]
"""Of a run of six steps, saved at 3 and 6."""


def names(folder):
    """What is in a folder."""
    return {p.name for p in folder.iterdir()}


def same_weights(a, b):
    """The safetensors of two folders are equal bit for bit."""
    from safetensors.torch import load_file

    left, right = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert left.keys() == right.keys()
    return all(left[name].equal(right[name]) for name in left)
