"""Run something twice with the same dropout."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker


@contextmanager
def same_randomness() -> Iterator[None]:
    """Put every random state back at the end, so that what follows draws what was drawn here."""
    host = torch.get_rng_state()
    device = torch.cuda.get_rng_state()
    tracker = get_cuda_rng_tracker()
    states = {name: state.clone() for name, state in tracker.get_states().items()}
    try:
        yield
    finally:
        torch.set_rng_state(host)
        torch.cuda.set_rng_state(device)
        tracker.set_states(states)
