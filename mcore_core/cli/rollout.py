"""`mcore rollout`: start a server that generates for training runs."""

from collections.abc import Sequence
from importlib import import_module

from mcore_core.errors import UsageError, usage_error
from mcore_core.manager import PluginManager

ENGINE = "vllm"


def main(argv: Sequence[str]) -> int:
    """Run the module `serve` beside the engine that an installed plugin brings."""
    manager = PluginManager()
    manager.load_installed()
    try:
        component = manager.catalogue("mcore_rollout_engines").find(ENGINE, "mcore rollout")
    except UsageError as error:
        raise usage_error(
            "MC363",
            "no installed plugin brings a server",
            "fix: uv pip install mcore-rlhf",
        ) from error
    package = component.target.partition(":")[0].rpartition(".")[0]
    code: int = import_module(f"{package}.serve").main(argv)
    return code
