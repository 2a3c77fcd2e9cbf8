"""Patches of upstream packages, each with its reason; `apply()` runs once."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

_applied = False


def apply() -> None:
    """Import megatron-core and patch what this platform needs."""
    global _applied
    if _applied:
        return
    from mcore_core.compat.quiet import quiet_imports, quiet_logs  # noqa: PLC0415
    from mcore_core.platform import install  # noqa: PLC0415  (torch)

    quiet_logs()
    with quiet_imports():
        platform = install()
        with _unseen("wandb"):
            for name in ("distributed", "models.hybrid.hybrid_model", "optimizer"):
                import_module(f"megatron.core.{name}")
        from mcore_core.compat import layer_wise, optimizer_buckets  # noqa: PLC0415  (torch)

        optimizer_buckets.patch()
        layer_wise.patch()
        if platform.name == "cpu":
            from mcore_core.platform.cpu_megatron import patch_megatron  # noqa: PLC0415

            patch_megatron()
    _applied = True


@contextmanager
def _unseen(package: str) -> Iterator[None]:
    """Let a package look absent: megatron.core.timers imports wandb, and that pandas, for a second.

    It is for a writer of megatron's own timers, which are not used here (megatron-core 0.19).
    """
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]  # import: ModuleNotFoundError
    try:
        yield
    finally:
        del sys.modules[package]
