"""torch.cuda names, CUDA devices and CUDA type names on a machine that has none of them."""

import contextlib
import functools
import os
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.utils.checkpoint
from torch.utils._device import _device_constructors

_CPU = torch.device("cpu")
_FACTORIES = [
    "tensor",
    "as_tensor",
    "empty",
    "zeros",
    "ones",
    "full",
    "arange",
    "linspace",
    "eye",
    "rand",
    "randn",
    "randint",
    "randperm",
    "empty_like",
    "zeros_like",
    "ones_like",
    "full_like",
    "rand_like",
    "randn_like",
    "randint_like",
    "empty_strided",
    "scalar_tensor",
    "tril_indices",
    "triu_indices",
]
_NEW = ["new_empty", "new_zeros", "new_ones", "new_full", "new_tensor"]
_NO_RESULT = [
    "synchronize",
    "set_device",
    "empty_cache",
    "ipc_collect",
    "_sleep",
    "set_stream",
    "reset_peak_memory_stats",
    "reset_max_memory_allocated",
    "_lazy_init",
    "init",
]
_ZERO = [
    "memory_allocated",
    "max_memory_allocated",
    "memory_reserved",
    "max_memory_reserved",
    "utilization",
    "temperature",
    "power_draw",
    "clock_rate",
]
_DTYPES = ["Float", "Half", "BFloat16", "Long", "Int", "Bool", "Byte", "Double"]


class HostStream:
    """A stream or event of a device that runs everything in order, at once."""

    cuda_stream = 0
    device = "cpu"

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def _nothing(self, *args: object, **kwargs: object) -> None:
        return None

    wait_stream = wait_event = synchronize = record = wait = _nothing

    def record_event(self, event: "HostStream | None" = None) -> "HostStream":
        """Return the event."""
        return event or HostStream()

    def query(self) -> bool:
        """Everything submitted is done."""
        return True

    def elapsed_time(self, other: object) -> float:
        """No time passes on a device that is not there."""
        return 0.0

    @staticmethod
    def priority_range() -> tuple[int, int]:
        """There is one priority."""
        return (0, 0)

    def __enter__(self) -> "HostStream":
        return self

    def __exit__(self, *exc: object) -> None:
        return None


class _Generators:
    """`torch.cuda.default_generators`: whatever the index, the CPU generator."""

    def __getitem__(self, index: int) -> torch.Generator:
        return torch.default_generator

    def __len__(self) -> int:
        return 1


def _const(value: object) -> Callable[..., Any]:
    """One function object a name: dynamo refuses two torch names that are the same object."""
    return lambda *args, **kwargs: value


def patch_cuda() -> None:
    """Give `torch.cuda` names that raise without CUDA a meaning on the host."""
    cuda: Any = torch.cuda
    # a torch.device, not an int: nearly every use is `device=torch.cuda.current_device()`
    cuda.current_device = lambda: _CPU
    cuda.device_count = lambda: 1
    for name in _NO_RESULT:
        setattr(cuda, name, _const(None))
    for name in _ZERO:
        setattr(cuda, name, _const(0))
    cuda.memory_stats = lambda *a, **k: {}
    cuda.mem_get_info = lambda *a, **k: (0, 0)
    cuda.get_device_capability = lambda *a, **k: (0, 0)
    cuda.get_device_name = lambda *a, **k: "cpu"
    properties = types.SimpleNamespace(
        name="cpu",
        major=0,
        minor=0,
        total_memory=0,
        multi_processor_count=os.cpu_count() or 1,
        uuid="cpu",
    )
    cuda.get_device_properties = lambda *a, **k: properties
    cuda.is_current_stream_capturing = lambda: False
    cuda.Stream = cuda.Event = cuda.ExternalStream = HostStream
    stream = HostStream()
    cuda.current_stream, cuda.default_stream = _const(stream), _const(stream)
    cuda.stream = lambda s=None: contextlib.nullcontext(s)
    cuda.device = lambda *a, **k: contextlib.nullcontext()
    cuda._lazy_call = lambda function, **k: function()
    cuda.default_generators = _Generators()
    for module in (cuda, cuda.random):
        module.get_rng_state = lambda *a, **k: torch.get_rng_state()
        module.set_rng_state = lambda state, *a, **k: torch.set_rng_state(state)
        module.manual_seed = lambda seed: torch.default_generator.manual_seed(int(seed))
    for name in ("range_push", "range_pop", "mark"):
        setattr(cuda.nvtx, name, _const(None))
    cuda.nvtx.range = lambda *a, **k: contextlib.nullcontext()
    for name in _DTYPES:
        # isinstance(x, torch.cuda.FloatTensor) is False for a CPU tensor; as types they must be
        # the CPU ones for the dtype tests of megatron.core.transformer.module
        setattr(cuda, name + "Tensor", getattr(torch, name + "Tensor"))


def _host(device: Any) -> Any:  # noqa: ANN401
    if isinstance(device, str):
        return _CPU if device.startswith("cuda") else device
    if isinstance(device, torch.device) and device.type == "cuda":
        return _CPU
    return device


def _with_device(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        if "device" in kwargs:
            kwargs["device"] = _host(kwargs["device"])
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return function(*args, **kwargs)

    return wrapped


def _mover(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(self: object, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        if args:
            args = (_host(args[0]), *args[1:])
        if "device" in kwargs:
            kwargs["device"] = _host(kwargs["device"])
        return function(self, *args, **kwargs)

    return wrapped


def patch_devices() -> None:
    """Make `device="cuda"`, `.cuda()` and `.to("cuda")` mean the host."""
    tensor: Any = torch.Tensor
    module: Any = torch.nn.Module
    # torch keeps the set of its factories from the first `with torch.device(...)`: it must hold the
    # originals, which the wrappers call, or such a block (transformers' meta device) does nothing
    _device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _with_device(getattr(torch, name)))
    for name in _NEW:
        setattr(tensor, name, _with_device(getattr(tensor, name)))
    tensor.to = _mover(tensor.to)
    module.to = _mover(module.to)
    tensor.cuda = lambda self, *a, **k: self
    module.cuda = lambda self, *a, **k: self
    tensor.pin_memory = lambda self, *a, **k: self
    tensor.record_stream = lambda self, stream: None
    load: Any = torch.load

    @functools.wraps(load)
    def torch_load(f: object, map_location: object = None, **kwargs: object) -> object:
        return load(f, map_location=_host(map_location), **kwargs)

    setattr(torch, "load", torch_load)  # noqa: B010


class _TypeName(str):
    """`torch.FloatTensor` that also equals `torch.cuda.FloatTensor`."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, str):
            return False
        return str.__eq__(self, other.replace("torch.cuda.", "torch.", 1))

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


def patch_type_names() -> None:
    """Let `Tensor.type()` compare equal to its CUDA spelling (megatron's optimizers ask so)."""
    tensor: Any = torch.Tensor
    original = tensor.type

    @functools.wraps(original)
    def type_(self: object, dtype: object = None, *args: object, **kwargs: object) -> object:
        if dtype is None and not kwargs:
            return _TypeName(original(self))
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.", 1)
        return original(self, dtype, *args, **kwargs)

    tensor.type = type_


def patch_compile() -> None:
    """Make `torch.compile` the identity, and what torch hides from it what it is.

    `torch._compile._disable_dynamo` imports dynamo, for a second, at the first call of what it
    wraps: the methods of optimizers, and recomputation.
    """

    def compile_(model: object = None, **kwargs: object) -> object:
        return (lambda function: function) if model is None else model

    setattr(torch, "compile", compile_)  # noqa: B010
    for owner in (torch.optim.Optimizer, torch.utils.checkpoint):
        for function in vars(owner).values():
            code = getattr(function, "__code__", None)
            if code is not None and code.co_qualname == "_disable_dynamo.<locals>.inner":
                function.__wrapped__.__dynamo_disable = function.__wrapped__
