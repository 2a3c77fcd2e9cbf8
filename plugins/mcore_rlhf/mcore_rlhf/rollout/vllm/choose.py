"""The engine `vllm`: in one of its two modes."""

from typing import TYPE_CHECKING

from mcore_rlhf.rollout.config import RolloutConfig

if TYPE_CHECKING:
    from mcore_core.protocols import EngineContext, RolloutEngine


def engine(context: "EngineContext") -> "RolloutEngine":
    """Return the engine of --vllm_mode. Raises UsageError where what it needs is missing."""
    if context.config[RolloutConfig].mode == "server":
        from mcore_rlhf.rollout.vllm.servers import VllmServers  # noqa: PLC0415

        return VllmServers(context)
    from mcore_rlhf.rollout.vllm.colocate import VllmColocated  # noqa: PLC0415

    return VllmColocated(context)
