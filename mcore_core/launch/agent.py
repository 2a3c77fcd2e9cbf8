"""The process that holds torchrun's agent: `python -m mcore_core.launch.agent OPTIONS ARG...`."""

import json
import logging
import sys
import uuid
from typing import Any

USER_MISTAKE = 2


def main(argv: list[str]) -> int:
    """Start the ranks and return the exit code of the run."""
    from torch.distributed.elastic.multiprocessing.api import SignalException  # noqa: PLC0415
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError  # noqa: PLC0415
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch  # noqa: PLC0415

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    options: dict[str, Any] = json.loads(argv[0])
    static = options["nnodes"] > 1
    config = LaunchConfig(
        min_nodes=options["nnodes"],
        max_nodes=options["nnodes"],
        nproc_per_node=options["nproc_per_node"],
        run_id="mcore" if static else uuid.uuid4().hex,
        rdzv_backend="static" if static else "c10d",
        rdzv_endpoint=f"{options['master_addr']}:{options['master_port']}",
        rdzv_configs={"rank": options["node_rank"], "timeout": 900},
        max_restarts=0,
        monitor_interval=0.1,
    )
    command = ["-m", "mcore_core.cli.main", *argv[1:]]
    try:
        elastic_launch(config, sys.executable)("-u", "-P", *command)
    except ChildFailedError as error:
        return _report(error)
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def _report(error: Any) -> int:  # noqa: ANN401
    """Say which rank ended how, unless it was a user's mistake that the rank itself explains."""
    codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
    if USER_MISTAKE in codes.values():
        return USER_MISTAKE
    rank, first = error.get_first_failure()
    how = f"exit code {first.exitcode}"
    if first.exitcode < 0:
        how = f"signal {first.signal_name()}"
        if first.signal_name() == "SIGKILL":
            how += " (killed from outside; often the machine ran out of memory)"
    sys.stderr.write(f"error[MC623]: rank {rank} ended first, with {how}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
