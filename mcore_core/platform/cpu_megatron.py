"""Megatron-core names that have no meaning without Transformer Engine, Apex or a compiler."""

import contextlib
import multiprocessing
import signal
import sys
import types
from collections.abc import Callable
from multiprocessing.managers import SyncManager
from typing import Any

import torch

from mcore_core.platform.cpu_adam import FusedAdam

HIDDEN = [
    "transformer_engine",
    "transformer_engine_torch",
    "apex",
    "amp_C",
    "flash_attn",
    "flash_attn_2_cuda",
    "flash_attn_3",
    "flashinfer",
    "fused_weight_gradient_mlp_cuda",
    "grouped_gemm",
    "deep_ep",
    "nvidia_kitchen",
    "nvidia_resiliency_ext",
    "mamba_ssm",
    "causal_conv1d",
    "fla",
    "tilelang",
    "flash_mla",
    "cudnn",
]
"""GPU-only packages that megatron probes for. A half-installed one (a wheel without its library)
raises something other than ImportError, which megatron does not catch."""


def hide_gpu_packages() -> None:
    """Make every package of HIDDEN look absent."""
    for name in HIDDEN:
        if name not in sys.modules:
            sys.modules[name] = None  # type: ignore[assignment]  # import: ModuleNotFoundError


def stub_jit() -> None:
    """Replace megatron.core.jit, whose fuser imports dynamo, by the identity."""
    jit: Any = types.ModuleType("megatron.core.jit")

    def identity(function: Callable[..., Any] | None = None, **kwargs: object) -> Any:  # noqa: ANN401
        return (lambda f: f) if function is None else function

    jit.noop_decorator = jit.jit_fuser = identity
    jit.enable_jit_fuser = jit.disable_jit_fuser = lambda: None
    sys.modules["megatron.core.jit"] = jit


def patch_megatron() -> None:
    """Call once after `import megatron.core`."""
    _patch_recompute()
    _patch_optimizer()
    _patch_save_queue()


def _patch_recompute() -> None:
    """CheckpointWithoutOutput asks TE about fp8: it tests a default of False for None."""
    from megatron.core.tensor_parallel import random as module  # noqa: PLC0415

    mcore_random: Any = module
    if not mcore_random.HAVE_TE:
        mcore_random.FP8GlobalStateManager = types.SimpleNamespace(
            is_fp8_enabled=lambda: False, get_fp8_recipe=lambda: None
        )
        mcore_random.activation_recompute_forward = lambda *a, **k: contextlib.nullcontext()
        mcore_random.fp8_autocast = lambda *a, **k: contextlib.nullcontext()

    def share_storage(dst: torch.Tensor, src: torch.Tensor) -> None:
        """Stands for a C++ extension that would be built at the first recompute."""
        a, b = dst.untyped_storage(), src.untyped_storage()
        a.resize_(b.nbytes())
        a.copy_(b)

    mcore_random._share_storage_ext = types.SimpleNamespace(share_storage=share_storage)


def _patch_optimizer() -> None:
    """Give the distributed optimizer an Adam in FusedAdam's layout.

    With torch's Adam it cannot load before a first step and then shares one step counter among all
    parameters (resume off by 1e-2, measured); so checkpoints of CPU and GPU are also the same.
    """
    from megatron.core import optimizer as optimizer_module  # noqa: PLC0415
    from megatron.core.optimizer import distrib_optimizer as distrib_module  # noqa: PLC0415

    optimizer: Any = optimizer_module
    distrib: Any = distrib_module
    if distrib.HAVE_APEX_OR_TE:
        return
    optimizer.Adam = distrib.Adam = FusedAdam
    optimizer.USING_PYTORCH_OPTIMIZER, distrib.HAVE_APEX_OR_TE = False, True
    distrib.USING_APEX_OPTIMIZER = True
    # float32 training: a main parameter is a view of the leaf itself
    distrib.DistributedOptimizer.load_state_dict = torch.no_grad()(
        distrib.DistributedOptimizer.load_state_dict
    )


def _patch_save_queue() -> None:
    """Saving spawns a process for one queue, which imports everything again: fork it instead.

    It ends with its parent; else a killed rank would leave it behind, holding its output open.
    """
    from megatron.core.dist_checkpointing.strategies import (  # noqa: PLC0415
        filesystem_async as module,
    )

    filesystem: Any = module

    def get_write_results_queue(mp_mode: str = "fork") -> Any:  # noqa: ANN401
        if filesystem._results_queue is None:
            manager = SyncManager(ctx=multiprocessing.get_context("fork"))
            manager.start(_end_with_parent)
            filesystem._results_queue = manager.Queue()
        return filesystem._results_queue

    filesystem.get_write_results_queue = get_write_results_queue


def _end_with_parent() -> None:
    """Ask Linux to kill this process when its parent dies."""
    if sys.platform == "linux":
        import ctypes  # noqa: PLC0415  (here only)

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
