"""One side of a comparison in a process of its own: this script again, with `--side`."""

import json
import os
import subprocess
import sys
from typing import Any


def run_side(script: str, side: str, **options: object) -> dict[str, Any]:
    """Return the JSON document of the last line of `script --side SIDE --OPTION VALUE ...`.

    Exits with what the process said where it failed.
    """
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    environment = {"OMP_NUM_THREADS": str(os.cpu_count()), **os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, script, "--side", side, *flags]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if ran.returncode:
        sys.exit(f"{side} failed:\n{ran.stdout[-1000:]}\n{ran.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found
