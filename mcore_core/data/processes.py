"""How worker processes are started: forked where that is safe, which shares what is in memory."""

import sys


def start_method() -> str:
    """Return "fork" on Linux as long as CUDA is not in use here, else "spawn"."""
    torch = sys.modules.get("torch")
    if sys.platform != "linux" or (torch is not None and torch.cuda.is_initialized()):
        return "spawn"
    return "fork"
