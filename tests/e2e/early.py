"""Run commands in forks of a process that has not imported torch: `python early.py < argvs.json`.

Prints a JSON list of {code, err, torch}: torch tells whether the command imported it.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

from mcore_core.cli.main import main
from mcore_core.cli.run import prepare  # noqa: F401  (before the forks, to import it once)


def end_of(argv):
    with tempfile.TemporaryDirectory() as folder:
        log, seen = Path(folder) / "err", Path(folder) / "seen"
        pid = os.fork()
        if pid == 0:
            code = 99
            try:
                os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
                sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
                code = main(argv)
                sys.stderr.flush()
                seen.write_text(json.dumps("torch" in sys.modules))
            finally:
                os._exit(code)
        _, status = os.waitpid(pid, 0)
        torch = json.loads(seen.read_text()) if seen.exists() else None
        return {
            "code": os.waitstatus_to_exitcode(status), "err": log.read_text(), "torch": torch
        }  # fmt: skip


if __name__ == "__main__":
    assert "torch" not in sys.modules
    json.dump([end_of(argv) for argv in json.load(sys.stdin)], sys.stdout)
