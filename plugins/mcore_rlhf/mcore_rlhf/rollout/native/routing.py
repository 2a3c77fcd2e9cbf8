"""Which experts the engine's tokens went to, for training to repeat it (router_replay_mode R3).

Shapes: T tokens of a pass, L layers with experts, K chosen experts.
"""

from typing import TYPE_CHECKING

import torch

from mcore_core.model.moe.replay import RoutingRecorder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from mcore_core.protocols import EngineContext

OPTION = "router_replay_mode"


def recorder_of(context: "EngineContext") -> RoutingRecorder | None:
    """Return what records the policy's routers; None where nobody asks for it."""
    config = context.config
    if OPTION not in config.names or config.get(OPTION) != "R3":
        return None
    return RoutingRecorder(context.chunks)


def routed(recorder: RoutingRecorder, tokens: int, device: torch.device) -> "NDArray[np.int16]":
    """Return the experts of the last pass's tokens, [T, L, K]; collective in the model."""
    found = recorder.combine(recorder.take(tokens, device))
    routing_TLK: NDArray[np.int16] = found.to(torch.int16).cpu().numpy()
    return routing_TLK
