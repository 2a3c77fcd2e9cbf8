"""`mcore doctor`: report versions, devices, plugin problems, and how to get what is missing."""

import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from mcore_core.cli.plugins import describe_plugins
from mcore_core.cli.prepare import known_flags
from mcore_core.manager import PluginManager

USAGE = "usage: mcore doctor [--json]\n\nReport versions, devices and what is missing.\n"
_GIB = 2**30


@dataclass(frozen=True, slots=True)
class Package:
    """A package that mcore uses, and for what."""

    name: str
    purpose: str
    install: str
    required: bool = False
    gpu_only: bool = False


PACKAGES = (
    Package("torch", "tensors", "uv pip install torch", required=True),
    Package("megatron-core", "parallelism", "uv pip install megatron-core", required=True),
    Package("transformers", "tokenizers and configs", "uv pip install transformers", required=True),
    Package("datasets", "data", "uv pip install datasets", required=True),
    Package(
        "transformer-engine",
        "FP8 and fused layers on GPUs",
        "uv pip install 'mcore-core[te]'",
        gpu_only=True,
    ),
    Package(
        "flash-attn",
        "flash attention within Transformer Engine",
        "uv pip install 'mcore-core[flash]'",
        gpu_only=True,
    ),
    Package(
        "emerging-optimizers", "--optimizer muon, dist_muon", "uv pip install 'mcore-core[muon]'"
    ),
    Package("wandb", "--report_to wandb", "uv pip install 'mcore-core[wandb]'"),
    Package("swanlab", "--report_to swanlab", "uv pip install 'mcore-core[swanlab]'"),
)


def main(argv: Sequence[str]) -> int:
    """Run the command; the exit code is 1 where something needed is missing or broken."""
    given = known_flags(argv, "doctor", ("--json", "--help", "-h"))
    if given & {"-h", "--help"}:
        sys.stdout.write(USAGE)
        return 0
    report = diagnose()
    if "--json" in given:
        json.dump(report, sys.stdout, indent=1)
        sys.stdout.write("\n")
    else:
        sys.stdout.write(_render(report))
    return 1 if report["problems"] else 0


def diagnose() -> dict[str, Any]:
    """Return the report as JSON has it."""
    manager = PluginManager()
    manager.load_installed()
    packages = [_package(package) for package in PACKAGES]
    devices, failure = _devices()
    problems = [str(error) for error in manager.broken.values()]
    problems += [
        f"{p['name']} is not installed; fix: {p['install']}"
        for p in packages
        if p["required"] and p["version"] is None
    ]
    return {
        "mcore": version("mcore-core"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "devices": devices,
        "plugins": describe_plugins(manager),
        "problems": problems + ([failure] if failure else []),
    }


def _package(package: Package) -> dict[str, Any]:
    try:
        found: str | None = version(package.name)
    except PackageNotFoundError:
        found = None
    return {
        "name": package.name,
        "version": found,
        "purpose": package.purpose,
        "required": package.required,
        "gpu_only": package.gpu_only,
        "install": package.install,
    }


def _devices() -> tuple[list[dict[str, Any]], str]:
    """Return the devices, and what went wrong in looking for them."""
    cpu = {"kind": "cpu", "name": platform.machine(), "cores": os.cpu_count()}
    try:
        import torch  # noqa: PLC0415  (slow; only this line needs it)
    except Exception as error:  # a broken build raises OSError, RuntimeError and others
        return [cpu], f"torch cannot be imported: {type(error).__name__}: {error}"
    gpus = []
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        memory = round(found.total_memory / _GIB, 1)
        gpus.append({"kind": "cuda", "name": found.name, "memory_gib": memory})
    return [cpu, *gpus], ""


def _render(report: dict[str, Any]) -> str:
    gpus = [d for d in report["devices"] if d["kind"] == "cuda"]
    lines = [
        f"mcore {report['mcore']}, Python {report['python']}, {report['platform']}",
        "",
        "devices:",
        *(
            f"  {d['kind']:6} {d['name']}, "
            + (f"{d['cores']} cores" if d["kind"] == "cpu" else f"{d['memory_gib']} GiB")
            for d in report["devices"]
        ),
    ]
    if not gpus:
        lines.append("  no CUDA GPU: runs use the CPU, with gloo and mcore's own layers")
    lines += ["", "packages:"]
    for p in report["packages"]:
        lines.append(f"  {p['name']:20} {p['version'] or 'missing':14} {p['purpose']}")
        if p["version"] is None and (gpus or not p["gpu_only"]):
            lines.append(f"  {'':20} to get it: {p['install']}")
    lines += ["", "plugins:"]
    for p in report["plugins"]:
        lines.append(f"  {p['name']:20} {p['version'] or '':14} {p['summary']}")
    if not report["plugins"]:
        lines.append("  none: uv pip install 'mcore-core[sft]'")
    lines += ["", "problems:" if report["problems"] else "no problems found"]
    lines += [f"  {line}" for problem in report["problems"] for line in problem.splitlines()]
    return "\n".join(lines) + "\n"
