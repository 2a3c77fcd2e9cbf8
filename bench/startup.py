"""How long commands take to start, and that help does not import torch.

Limits: `mcore --help` 80 ms, `mcore run --plugin sft --help` 500 ms, the first step of a small
model 8 s after the process starts (on the CPU; data tokenized anew). Medians of several processes;
the last line is one JSON document, with each time as a ratio of its limit.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

LIMITS = {"help": 0.08, "run_help": 0.5, "first_step": 8.0}
HELP = {"help": ["--help"], "run_help": ["run", "--plugin", "sft", "--help"]}
MCORE = [sys.executable, "-c", "import sys; from mcore_core.cli.main import main; sys.exit(main())"]


def main() -> None:
    """Measure; exit 1 where a limit is not kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=11, help="processes of each help command")
    parser.add_argument("--first_steps", type=int, default=3, help="processes that take a step")
    options = parser.parse_args()
    found = {name: help_seconds(argv, options.runs) for name, argv in HELP.items()}
    if options.first_steps:
        found["first_step"] = first_step_seconds(options.first_steps)
    torch = [name for name, argv in HELP.items() if "torch" in imported(argv)]
    ratios = {name: round(seconds / LIMITS[name], 3) for name, seconds in found.items()}
    print(
        json.dumps(
            {
                "seconds": {name: round(seconds, 4) for name, seconds in found.items()},
                "of_limit": ratios,
                "imports_torch": torch,
            }
        )
    )
    sys.exit(bool(torch) or max(ratios.values()) > 1)


def command() -> list[str]:
    """Return the installed command, or the same through the interpreter."""
    installed = Path(sys.executable).with_name("mcore")
    return [str(installed)] if installed.exists() else MCORE


def help_seconds(
    argv: list[str], runs: int, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Return the median time of a help command, one process after the other."""
    times = []
    for _ in range(runs + 1):
        begin = clock()
        subprocess.run([*command(), *argv], stdout=subprocess.DEVNULL, check=True)
        times.append(clock() - begin)
    return statistics.median(times[1:])  # the first one may write bytecode


def imported(argv: list[str]) -> set[str]:
    """Return the modules that a command imports."""
    code = f"""
import json, sys
from mcore_core.cli.main import main
code = main({argv!r})
sys.stderr.write(json.dumps(sorted(sys.modules)))
sys.exit(code)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stderr.splitlines()[-1]))


def first_step_seconds(runs: int, *, warm: int = 1) -> float:
    """Return the median time from the start of a process to the end of its first step.

    `warm` processes before them do not count: the first one may write bytecode.
    """
    from synthetic import SMALL, write_model, write_texts

    times = []
    with tempfile.TemporaryDirectory(prefix="mcore-startup-") as name:
        folder = Path(name)
        model = write_model(folder / "model", SMALL)
        data = write_texts(folder / "rows.jsonl", rows=64, tokens=64, vocabulary=2048)
        for i in range(warm + runs):
            save = folder / f"run{i}"
            argv = f"run --plugin sft --model {model} --dataset {data} --save {save}".split()
            argv += ["--add_version", "false", "--train_iters", "1", "--global_batch_size", "2"]
            env = {
                **os.environ,
                "MCORE_CACHE": f"{folder}/cache{i}",
                "CUDA_VISIBLE_DEVICES": "",
                "OMP_NUM_THREADS": "1",
            }
            begin = time.time()
            subprocess.run([*command(), *argv], check=True, capture_output=True, env=env)
            times.append((save / "metrics.jsonl").stat().st_mtime - begin)
    return statistics.median(times[warm:])


if __name__ == "__main__":
    main()
