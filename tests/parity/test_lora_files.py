"""PEFT's adapters in every layout: read, written and merged as on one rank, to the last bit."""

from functools import cache

import pytest
import torch
from family_cases import CASES, DENSE_LAYOUTS, MOE_LAYOUTS, layouts_of, quiet, tensors_of, write
from lora_runs import open_model
from safetensors.torch import load_file
from test_lora_peft import made_by_peft

from mcore_core.testing.ranks import fork_ranks

DENSE = ("llama", "llama-biases-tied", "qwen2-tied", "qwen3", "phi3", "gemma3_text")
MOE = ("qwen2_moe", "deepseek_v3", "gpt_oss", "qwen3_next")
PAIRS = [(n, layout) for n in DENSE for layout in DENSE_LAYOUTS]
PAIRS += [(n, layout) for n in MOE for layout in MOE_LAYOUTS]
QUICK = {("llama", "TP2"), ("llama", "PP2"), ("qwen2_moe", "TP2+EP2"), ("qwen2_moe", "EP2")}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Return the folder with a case's model, and PEFT's adapter of it."""

    @cache
    def make(name):
        quiet()
        folder = tmp_path_factory.mktemp(name)
        write(folder / "model", CASES[name])
        tuned = made_by_peft(folder / "model", CASES[name], name)
        tuned.save_pretrained(folder / "theirs", save_embedding_layers=False)
        _pass_through(folder, name, {})
        return folder

    return make


def _pass_through(folder, name, sizes):
    """Read PEFT's adapter in a layout; write it again, and the merged model."""
    out = folder / "-".join(["run", *map(str, sizes.values())])
    given = [str(folder / "theirs")]

    def one_rank(_):
        bridge, tuner, chunks = open_model(
            folder / "model", CASES[name], sizes or {"world": 1}, adapters=given
        )
        tuner.export(chunks, out / "adapter")
        if tuner.mergeable:
            merged = tuner.merged(chunks)
            size, source = 10**9, folder / "model"
            bridge.save(chunks, out / "merged", max_shard_size=size, source=source, weights=merged)

    fork_ranks(one_rank, sizes.get("world", 1))
    return out


def _sizes(layout):
    names = ("world", "tp", "pp", "ep", "etp", "sp")
    return {n: getattr(layout, n) for n in names}


@pytest.mark.parametrize(
    ("name", "layout"),
    [p if p in QUICK else pytest.param(*p, marks=pytest.mark.parity) for p in PAIRS],
)
def test_the_files_do_not_depend_on_the_layout(adapters, name, layout):
    folder = adapters(name)
    out = _pass_through(folder, name, _sizes(layouts_of(CASES[name])[layout]))
    theirs = load_file(folder / "theirs/adapter_model.safetensors")
    mine = load_file(out / "adapter/adapter_model.safetensors")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[k], theirs[k]) for k in theirs)
    config = "adapter/adapter_config.json"
    assert (out / config).read_text() == (folder / "run" / config).read_text()
    if (folder / "run/merged").is_dir():
        here, alone = tensors_of(out / "merged"), tensors_of(folder / "run/merged")
        assert here.keys() == alone.keys()
        base = tensors_of(folder / "model")
        assert any(not torch.equal(alone[k], base[k]) for k in base)
        for key, weight in alone.items():
            # a product of a part of B may be summed in another order
            torch.testing.assert_close(here[key], weight, rtol=1e-6, atol=1e-6)
