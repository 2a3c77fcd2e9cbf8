"""Patches of upstream packages, each with its reason; `apply()` runs once, after megatron's import."""

_applied = False


def apply() -> None:
    """Import megatron-core and patch what this platform needs."""
    global _applied
    if _applied:
        return
    from mcore_core.platform import install  # noqa: PLC0415  (torch)

    platform = install()
    import megatron.core  # noqa: F401, PLC0415

    if platform.name == "cpu":
        from mcore_core.platform.cpu_megatron import patch_megatron  # noqa: PLC0415

        patch_megatron()
    _applied = True
