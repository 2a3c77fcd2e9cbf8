"""Packing: how full the rows are and how fast, against TRL and transformers, on the same lengths.

Lengths are log-normal, as chats have them. Measured, in turns, in this process: mcore's pack()
alone; mcore's pack() and reading every packed row from the tokenized file; TRL's pack_dataset with
"bfd" and "wrapped" on the same ids; and transformers' DataCollatorWithFlattening, which packs
nothing but joins `--samples_a_batch` samples: its rows are as long as they come, and its fill is
what the longest row makes of the others. TRL's map writes its rows, so they are not read again.

fill: share of the rows' room that is used; padding: the rest, were rows padded to the full length.
Bounds: at least as full and at least as fast as TRL's bfd, and 95% full. The last line is one JSON
document.
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

FILL = 0.95


def main() -> None:
    """Measure; exit 1 where a bound is not kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--length", type=int, default=4096, help="of a packed row")
    parser.add_argument("--median", type=float, default=500.0, help="of the samples' lengths")
    parser.add_argument("--sigma", type=float, default=1.0)
    parser.add_argument("--samples_a_batch", type=int, default=8, help="of the flattening collator")
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    drawn = rng.lognormal(np.log(options.median), options.sigma, options.samples)
    lengths = np.clip(drawn, 1, options.length).astype(int)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = folder
        results = measure(lengths, options, Path(folder), rng)
    ours, trl = results["mcore, rows read"], results["trl bfd"]
    ratios = {
        "fill": ours["fill"] / trl["fill"],
        "samples_per_second": ours["samples_per_second"] / trl["samples_per_second"],
    }
    for name, found in results.items():
        print(
            f"{name:26} fill {found['fill']:7.2%}  padding {1 - found['fill']:7.2%}"
            f"  rows {found['rows']:6.0f}  {found['samples_per_second']:10,.0f} samples/s"
            f"  {found['rows_per_second']:9,.0f} rows/s  cut {found['cut']:.0f}"
        )
    kept = min(ratios.values()) >= 1 and ours["fill"] >= FILL
    print(
        f"mcore / trl bfd: fill {ratios['fill']:.4f}, speed {ratios['samples_per_second']:.2f} "
        f"(bounds 1 and 1; {FILL:.0%} full): {'kept' if kept else 'NOT KEPT'}"
    )
    print(json.dumps({"results": results, "ratios": ratios, "kept": kept}))
    sys.exit(not kept)


def measure(
    lengths: "np.ndarray[Any, Any]",
    options: argparse.Namespace,
    folder: Path,
    rng: np.random.Generator,
) -> dict[str, dict[str, float]]:
    """Return each method's numbers; times are medians over the turns."""
    import datasets
    from transformers import DataCollatorWithFlattening
    from trl.data_utils import pack_dataset

    from mcore_core.data.loader import Items
    from mcore_core.data.pack import pack
    from mcore_core.data.store import UnitTable, to_batch, unit_writer

    datasets.disable_progress_bars()
    ids = [rng.integers(0, 50_000, n).astype(np.int32) for n in lengths]
    path = folder / "units.arrow"
    with unit_writer(path) as writer:
        for start in range(0, len(ids), 512):
            part = ids[start : start + 512]
            ones = [np.ones(len(x), np.float32) for x in part]
            units = [
                {"input_ids": x, "weights": w, "length": len(x)}
                for x, w in zip(part, ones, strict=True)
            ]
            writer.write(to_batch(units))
    plain = datasets.Dataset.from_dict(
        {"input_ids": ids, "assistant_masks": [np.ones(len(x), np.int8) for x in ids]}
    )
    plain.save_to_disk(str(folder / "plain"))
    plain = datasets.load_from_disk(str(folder / "plain"))

    def mine() -> list[int]:
        table = UnitTable(path)
        return [int(table.lengths[p].sum()) for p in pack(table.lengths, options.length)]

    def mine_read() -> list[int]:
        table = UnitTable(path)
        items = Items(table, pack(table.lengths, options.length))
        return [sum(len(u["input_ids"]) for u in items[i]) for i in range(len(items))]

    def trl(strategy: str) -> Callable[[], list[int]]:
        def run() -> list[int]:
            packed = pack_dataset(
                plain, options.length, strategy, map_kwargs={"load_from_cache_file": False}
            )
            table = packed.with_format("arrow")
            starts = range(0, len(packed), 1000)
            return [len(row) for at in starts for row in table[at : at + 1000]["input_ids"]]

        return run

    def flattened() -> list[int]:
        collate, each = DataCollatorWithFlattening(), options.samples_a_batch
        starts = range(0, len(plain), each)
        batches = ([plain[j] for j in range(at, min(at + each, len(plain)))] for at in starts)
        return [int(collate(batch)["input_ids"].shape[1]) for batch in batches]

    methods = {
        "mcore, planned": mine,
        "mcore, rows read": mine_read,
        "trl bfd": trl("bfd"),
        "trl wrapped": trl("wrapped"),
        "transformers flattening": flattened,
    }
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    sizes: dict[str, list[int]] = {}
    for _ in range(options.turns):
        for name, run in methods.items():
            begin = time.perf_counter()
            with contextlib.redirect_stderr(None):
                sizes[name] = run()
            seconds[name].append(time.perf_counter() - begin)
    total = int(lengths.sum())
    results = {}
    for name, found in sizes.items():
        room = options.length if "flattening" not in name else max(found)
        spent = statistics.median(seconds[name])
        results[name] = {
            "fill": sum(found) / (len(found) * room),
            "rows": float(len(found)),
            "seconds": spent,
            "samples_per_second": len(lengths) / spent,
            "rows_per_second": len(found) / spent,
            "cut": float(total - sum(found)),
        }
    return results


if __name__ == "__main__":
    main()
