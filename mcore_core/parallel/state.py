"""Process groups: initialize them for a layout, and take them down."""

import os
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Literal

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from mcore_core.parallel.topology import Layout
    from mcore_core.platform.base import Platform


def environment_ranks() -> tuple[int, int, int]:
    """Return (rank, world size, local rank) as torchrun or Slurm set them; (0, 1, 0) without."""
    env = os.environ
    if "RANK" in env:
        return int(env["RANK"]), int(env.get("WORLD_SIZE", "1")), int(env.get("LOCAL_RANK", "0"))
    if "SLURM_PROCID" in env and int(env.get("SLURM_NTASKS", "1")) > 1:
        return (
            int(env["SLURM_PROCID"]),
            int(env["SLURM_NTASKS"]),
            int(env.get("SLURM_LOCALID", "0")),
        )
    return 0, 1, 0


def initialize(
    platform: "Platform",
    layout: "Layout",
    *,
    backend: Literal["nccl", "gloo"] | None = None,
    timeout_s: int = 600,
    seed: int = 42,
) -> None:
    """Join the process group and build megatron's groups for a layout. Collective.

    Args:
        platform: Chooses the device and the default backend.
        layout: Sizes; `layout.world` must be the number of processes.
        backend: Overrides the platform's.
        timeout_s: Seconds after which a collective that a rank never joined is an error.
        seed: Seeds every random state; tensor-parallel ranks get different streams for dropout.
    """
    from megatron.core import parallel_state  # noqa: PLC0415  (after the platform is installed)

    rank, world, local = environment_ranks()
    platform.set_device(local)
    if not dist.is_initialized():
        _join(backend or platform.backend, rank, world, timedelta(seconds=timeout_s))
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        distributed_timeout_minutes=max(1, timeout_s // 60),
    )
    seed_everything(seed)


def _join(backend: str, rank: int, world: int, timeout: timedelta) -> None:
    if world == 1 and "MASTER_ADDR" not in os.environ:
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
        return
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    dist.init_process_group(backend, rank=rank, world_size=world, timeout=timeout)


def seed_everything(seed: int) -> None:
    """Seed python, numpy, torch and megatron's random states from `seed` and the pipeline rank."""
    import random  # noqa: PLC0415

    import numpy as np  # noqa: PLC0415
    from megatron.core import parallel_state  # noqa: PLC0415
    from megatron.core.tensor_parallel.random import (  # noqa: PLC0415
        model_parallel_cuda_manual_seed,
    )

    seed += 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)


def silent_ranks(wait_s: float = 3.0) -> str:
    """Say which ranks are gone, after a collective has failed: all others say here that they live.

    Every rank that lost the others calls this at about the same time, and waits so long for them.
    """
    try:
        store = torch.distributed.distributed_c10d._get_default_store()
        store.set(f"mcore/alive/{dist.get_rank()}", "1")
        time.sleep(wait_s)
        world = range(dist.get_world_size())
        silent = [r for r in world if not store.check([f"mcore/alive/{r}"])]
    except (RuntimeError, ValueError):  # its holder is gone, a rank or a machine; or it never was
        return "rank 0, with which the others meet,"
    if not silent:
        return "a rank whose answer came too late"
    several = len(silent) > 1
    return f"rank{'s' if several else ''} {', '.join(map(str, silent))}"


def shut_down() -> None:
    """Destroy the groups."""
    from megatron.core import parallel_state  # noqa: PLC0415

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
