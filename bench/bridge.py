"""Memory and time of the bridge: a random model loaded and saved under tensor parallelism.

Memory: what a rank needs at its peak, its parameters included, stays under 1.3 times its own shard
plus one bucket, for loading and for saving. Time: loading and saving take at most 1.2 times what
transformers' from_pretrained, with parameters in memory of their own as ours are, and
save_pretrained take on the same files; both read a warm page cache, each save goes to a folder of
its own, and the best of some turns counts. The last line is one JSON document.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

MEMORY_LIMIT = 1.3
TIME_LIMIT = 1.2
SHARD = 10**9
"""Bytes of a file, for both."""


def main() -> None:
    """Measure; exit 1 where a limit is not kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=18)
    parser.add_argument("--vocabulary", type=int, default=64000)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="for the files; default: a temporary one")
    parser.add_argument("--case", choices=("write", "hf", "mcore"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        case = {"write": write, "hf": hf, "mcore": mcore}[options.case]
        print(json.dumps(case(options)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        options.folder = options.folder or Path(temporary)
        wrote = in_process("write", options)
        print(f"{wrote['parameters'] / 1e9:.2f}B parameters, bfloat16, TP{options.tp}")
        theirs, ours = in_process("hf", options), in_process("mcore", options)
    result = judge(ours, theirs)
    for name, entry in result["cases"].items():
        print(f"{name:12} {entry['value']:.2f} (limit {entry['limit']}) {entry['detail']}")
    print(json.dumps(result))
    sys.exit(0 if result["kept"] else 1)


def judge(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Return every figure beside its limit."""
    cases = {}
    for what in ("load", "save"):
        rank = max(ours["ranks"], key=lambda r: r[f"{what}_peak"] / r["shard"])
        allowed = MEMORY_LIMIT * rank["shard"] + ours[f"{what}_bucket"]
        peak = rank[f"{what}_peak"]
        cases[f"{what} memory"] = {
            "value": peak / allowed,
            "limit": 1.0,
            "detail": f"{peak / 2**20:.0f} of {allowed / 2**20:.0f} MiB a rank",
        }
        seconds = max(r[f"{what}_s"] for r in ours["ranks"])
        cases[f"{what} time"] = {
            "value": seconds / theirs[f"{what}_s"],
            "limit": TIME_LIMIT,
            "detail": f"{seconds:.2f} s, transformers {theirs[f'{what}_s']:.2f} s",
        }
    kept = all(c["value"] <= c["limit"] for c in cases.values())
    return {"cases": cases, "kept": kept}


def in_process(case: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one case in a process of its own."""
    command = [sys.executable, __file__, "--case", case]
    for name in ("hidden", "layers", "vocabulary", "tp", "repeat", "folder"):
        command += [f"--{name}", str(getattr(options, name))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def write(options: argparse.Namespace) -> dict[str, Any]:
    """Save a random llama."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 11 // 4,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=options.hidden // 256,
        vocab_size=options.vocabulary,
    )
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    model.save_pretrained(options.folder / "model", max_shard_size=SHARD)
    return {"parameters": sum(p.numel() for p in model.parameters())}


def hf(options: argparse.Namespace) -> dict[str, Any]:
    """Time transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    loads, saves = [], []
    for _ in range(options.repeat):
        start = time.perf_counter()
        model = AutoModelForCausalLM.from_pretrained(options.folder / "model", dtype=torch.bfloat16)
        for p in model.parameters():  # from_pretrained maps files: nothing has been read yet
            p.data = p.data.clone()
        loads.append(time.perf_counter() - start)
        start = time.perf_counter()
        model.save_pretrained(options.folder / "theirs", max_shard_size=SHARD)
        saves.append(time.perf_counter() - start)
        shutil.rmtree(options.folder / "theirs")
    return {"load_s": min(loads), "save_s": min(saves)}


def mcore(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the bridge on real ranks."""
    from mcore_core import compat

    compat.apply()
    from mcore_hfbridge import load, save

    from mcore_core.testing.ranks import fork_ranks

    ranks = fork_ranks(lambda _: one_rank(options), options.tp, timeout=1200)
    return {"ranks": ranks, "load_bucket": load.BUCKET, "save_bucket": save.BUCKET}


def one_rank(options: argparse.Namespace) -> dict[str, Any]:
    """Load and save on one rank."""
    import torch
    import torch.distributed as dist
    from mcore_hfbridge.bridge import HFBridge
    from mcore_hfbridge.families.llama import FAMILY

    from mcore_core.config.kernel import kernel_config
    from mcore_core.model.build import ModelPlan, build_chunks, decoder_config
    from mcore_core.model.resolve import read_hf_config
    from mcore_core.parallel.state import initialize
    from mcore_core.parallel.topology import Layout
    from mcore_core.platform import install

    layout = Layout(world=options.tp, tp=options.tp)
    initialize(install(), layout)
    folder = options.folder / "model"
    architecture = FAMILY.architecture(read_hf_config(folder))
    plan = ModelPlan(
        architecture=architecture,
        layout=layout,
        stage_layers=[architecture.num_layers],
        dtype=torch.bfloat16,
        transformer_engine=False,
    )
    config = decoder_config(plan, kernel_config(model=str(folder)), on_cpu=True, initialize=False)
    with Peak() as load_peak:
        chunks = build_chunks(plan, config)
        bridge = HFBridge(FAMILY, architecture)
        bridge.load(chunks, folder)
    shard = sum(p.nbytes for c in chunks for p in c.parameters())
    ours = options.folder / "ours"
    with Peak() as save_peak:
        bridge.save(chunks, ours, max_shard_size=SHARD, source=folder)
    loads, saves = [], []
    for _ in range(options.repeat):
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(ours)
        del chunks
        dist.barrier()
        start = time.perf_counter()
        chunks = build_chunks(plan, config)
        HFBridge(FAMILY, architecture).load(chunks, folder)
        loads.append(time.perf_counter() - start)
        dist.barrier()
        start = time.perf_counter()
        bridge.save(chunks, ours, max_shard_size=SHARD, source=folder)
        saves.append(time.perf_counter() - start)
    return {
        "shard": shard,
        "load_peak": load_peak.bytes,
        "save_peak": save_peak.bytes + shard,
        "load_s": min(loads),
        "save_s": min(saves),
    }


class Peak:
    """The most anonymous memory of this process over what it had at the start, sampled.

    Files that are mapped do not count: the kernel can drop their pages.
    """

    def __enter__(self) -> "Peak":
        self.before = self.bytes = 0
        self.before = self._now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self.bytes = max(self.bytes, self._now() - self.before)

    def _now(self) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
        return 0


if __name__ == "__main__":
    main()
