"""Run what was prepared: start ranks, or be one; turn every ending into a message and a code."""

import contextlib
import os
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mcore_core.cli.fit import warn_if_too_large
from mcore_core.config.distributed import DistributedConfig
from mcore_core.config.logging import LoggingConfig
from mcore_core.config.train import TrainConfig
from mcore_core.errors import UsageError
from mcore_core.failure import RunFailure
from mcore_core.launch import torchrun

if TYPE_CHECKING:
    from mcore_core.cli.prepared import Prepared, PreparedExport
    from mcore_core.platform.base import Platform
    from mcore_core.train.plan import ModelSource

FAILED, MISTAKE = 1, 2


def execute(prepared: "Prepared") -> int:
    """Train; return the exit code."""
    return _start(prepared, "run", lambda: _train(prepared))


def execute_export(prepared: "PreparedExport") -> int:
    """Convert weights; return the exit code."""
    from mcore_core.cli.convert import convert  # noqa: PLC0415

    return _start(prepared, "export", lambda: convert(prepared))


def _start(prepared: "PreparedExport", command: str, body: Callable[[], None]) -> int:
    options = prepared.config[DistributedConfig]
    for note in prepared.notes if int(os.environ.get("RANK", "0")) == 0 else ():
        sys.stderr.write(f"note: {note}\n")
    if torchrun.wanted(options):
        source_of(prepared)  # the model and the layout are checked before ranks start
        return torchrun.launch(options, [command, *prepared.argv])
    return _guarded(body)


def source_of(prepared: "PreparedExport") -> "ModelSource":
    """Return the model of the run; it, the data and the run folder are checked. Torch-free."""
    from mcore_core.cli.files import check_files  # noqa: PLC0415
    from mcore_core.cli.run import world_size  # noqa: PLC0415  (a module of commands)
    from mcore_core.train.plan import model_source  # noqa: PLC0415

    world = world_size(prepared.config, os.environ)
    source = model_source(prepared.config, prepared.manager, world)
    check_files(prepared, source)
    return source


def begin(prepared: "PreparedExport", source: "ModelSource") -> "Platform":
    """Prepare torch and megatron and join the process group; collective."""
    from mcore_core import compat  # noqa: PLC0415
    from mcore_core.compat.quiet import quiet_logs  # noqa: PLC0415
    from mcore_core.config.platform_rules import check_platform, facts  # noqa: PLC0415
    from mcore_core.platform import install  # noqa: PLC0415

    config = prepared.config
    platform = install()
    if problems := check_platform(config, facts(cuda=platform.name == "cuda")):
        raise UsageError(problems)
    compat.apply()
    quiet_logs(config[LoggingConfig].logging_level)
    from mcore_core.parallel.state import initialize  # noqa: PLC0415
    from mcore_core.train.loop import deterministic  # noqa: PLC0415

    distributed = config[DistributedConfig]
    deterministic(config[TrainConfig])
    initialize(
        platform,
        source.layout,
        backend=distributed.distributed_backend,
        timeout_s=distributed.ddp_timeout,
        seed=config[TrainConfig].seed,
    )
    return platform


def _train(prepared: "Prepared") -> None:
    source = source_of(prepared)
    platform = begin(prepared, source)
    warn_if_too_large(prepared.config, source, platform)
    from mcore_core.parallel.state import shut_down  # noqa: PLC0415
    from mcore_core.train.loop import train  # noqa: PLC0415
    from mcore_core.train.session import open_session  # noqa: PLC0415

    session = open_session(prepared, source, platform)
    try:
        train(session)
    except BaseException as error:
        session.reports.end(error)
        session.hooks.mcore_teardown(run=session.run, error=error)
        raise _explain(error, session.run.rank, session.run.step) from error
    session.reports.end(None)
    session.hooks.mcore_teardown(run=session.run, error=None)
    shut_down()


def _explain(error: BaseException, rank: int, step: int) -> BaseException:
    """Say which rank stopped where when a collective failed."""
    text = str(error)
    lost = ("Connection closed by peer", "Timed out", "timed out", "Connection reset", "NCCL")
    if isinstance(error, RuntimeError) and any(word in text for word in lost):
        from mcore_core.parallel.state import silent_ranks  # noqa: PLC0415

        return RunFailure(
            "MC803",
            f"rank {rank} lost the others in step {step + 1}",
            text.splitlines()[0][:300],
            f"{silent_ranks()} died or hung: look for its own error first",
            "fix: if a step or a save takes longer than the time-out, raise --ddp_timeout",
        )
    return error


def _guarded(body: Callable[[], None]) -> int:
    """Run the body; leave its error for the launcher, or print it, and return the exit code."""
    rank = int(os.environ.get("RANK", "0"))
    code = 0
    try:
        body()
    except UsageError as error:
        _leave(str(error), error, rank)
        code = MISTAKE
    except RunFailure as error:
        _leave(str(error), error, rank)
        code = FAILED
    except KeyboardInterrupt:
        raise
    except Exception as error:
        torchrun.leave_error("".join(traceback.format_exception(error)), rank)
        code = FAILED
    if code and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # other ranks may wait in a collective: leave without waiting for them
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    return code


def _leave(text: str, error: Any, rank: int) -> None:  # noqa: ANN401
    if os.environ.get("MCORE_TRACEBACK"):
        text = "".join(traceback.format_exception(error))
    torchrun.leave_error(text, rank)
