"""What this machine cannot do: options that need a GPU or a package that is not here."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

from mcore_core.config.compose import RunConfig
from mcore_core.config.decode import as_typed
from mcore_core.errors import Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class PlatformFacts:
    """What the rules need to know about this machine."""

    cuda: bool
    te: bool
    flash_attn: bool
    emerging_optimizers: bool


def facts(*, cuda: bool) -> PlatformFacts:
    """Return which packages are installed, without importing them; the caller knows the device."""
    return PlatformFacts(
        cuda=cuda,
        te=find_spec("transformer_engine") is not None,
        flash_attn=find_spec("flash_attn") is not None,
        emerging_optimizers=find_spec("emerging_optimizers") is not None,
    )


@dataclass(frozen=True, slots=True)
class Need:
    """One thing a machine may lack."""

    here: Callable[[PlatformFacts], bool]
    lacks: str
    get: str


GPU = Need(lambda f: f.cuda, "a CUDA GPU", "run on a machine with one")
TE = Need(
    lambda f: f.te,
    "Transformer Engine, which is not installed",
    "uv pip install 'mcore-core[te]'",
)
MUON = Need(
    lambda f: f.emerging_optimizers,
    "the package emerging-optimizers, which is not installed",
    "uv pip install 'mcore-core[muon]'",
)

_RULES: tuple[tuple[str, Callable[[RunConfig], bool], tuple[Need, ...], str], ...] = (
    ("transformer_impl", lambda c: c.get("transformer_impl") == "transformer_engine", (GPU, TE),
     "--transformer_impl auto"),
    ("fp8_format", lambda c: c.get("fp8_format") is not None, (GPU, TE), "--bf16"),
    ("use_precision_aware_optimizer", lambda c: bool(c.get("use_precision_aware_optimizer")),
     (GPU, TE), ""),
    ("optimizer_cpu_offload", lambda c: bool(c.get("optimizer_cpu_offload")), (GPU,), ""),
    ("use_persistent_ckpt_worker", lambda c: bool(c.get("use_persistent_ckpt_worker")), (GPU,), ""),
    ("tp_comm_overlap", lambda c: bool(c.get("tp_comm_overlap")), (GPU, TE), ""),
    ("distributed_backend", lambda c: c.get("distributed_backend") == "nccl", (GPU,),
     "--distributed_backend gloo"),
    ("attention_backend", lambda c: c.get("attention_backend") == "flash", (GPU,),
     "--attention_backend auto"),
    ("attention_backend", lambda c: c.get("attention_backend") == "fused", (GPU, TE),
     "--attention_backend auto"),
    ("cross_entropy_fusion_impl", lambda c: c.get("cross_entropy_fusion_impl") == "te", (GPU, TE),
     "--cross_entropy_fusion_impl native"),
    ("optimizer", lambda c: c.get("optimizer") in {"muon", "dist_muon"}, (MUON,),
     "--optimizer adam"),
)  # fmt: skip
"""Option, when it asks for something, what it then needs, and what does without."""


def check_platform(config: RunConfig, platform: PlatformFacts) -> list[Problem]:
    """Return a problem for each option that asks for what this machine does not have."""
    problems = []
    for option, applies, needs, instead in _RULES:
        missing = [need for need in needs if not need.here(platform)] if applies(config) else []
        if not missing:
            continue
        lacks = " and ".join(need.lacks for need in missing)
        problems.append(
            Problem(
                "MC312",
                f"--{option} {as_typed(config.get(option))} needs {lacks}",
                [f"fix: {missing[0].get}, or use {instead or f'--{option} false'}"],
            )
        )
    return problems
