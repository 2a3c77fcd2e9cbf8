"""`mcore export --test_convert_precision`: its table, and a damaged weight found at its layer."""

import pytest
import torch
from safetensors.torch import load_file
from test_bad_input import refused


def rows(text):
    """The table's numbers by place."""
    found = {}
    for line in text.splitlines():
        words = line.replace("layer ", "layer_").replace("final norm", "final_norm").split()
        if len(words) >= 4 and words[0].split("_")[0] in ("embedding", "layer", "final", "logits"):
            try:
                found[words[0]] = [float(w) for w in words[1:4]]
            except ValueError:
                continue
    return found


PLACES = ["embedding", "layer_0", "layer_1", "layer_2", "layer_3", "final_norm", "logits"]


def damage(layer):
    """Make loading spoil one weight of a layer: every other row of its second MLP matrix."""

    def before():
        from mcore_hfbridge.bridge import HFBridge

        load = HFBridge.load

        def spoiled(self, chunks, path):
            from mcore_core.model.names import named_weights

            load(self, chunks, path)
            for name, weight in named_weights(chunks).items():
                if name == f"decoder.layers.{layer}.mlp.linear_fc2.weight":
                    with torch.no_grad():
                        weight[::2] *= 1.02

        HFBridge.load = spoiled

    return before


def damage_written():
    """Spoil a weight of layer 3 on its way into the file, not in the model."""
    from mcore_hfbridge import export

    assemble = export.assemble

    def spoiled(*args, **kwargs):
        whole = assemble(*args, **kwargs)
        for name, tensor in whole.items():
            if name == "model.layers.3.self_attn.o_proj.weight":
                tensor.copy_(tensor.flip(0))
        return whole

    from mcore_hfbridge import save

    save.assemble = spoiled


def test_round_trip_and_its_table(mcore, model, tmp_path):
    out = tmp_path / "out"
    ran = mcore("export", "--to_hf", "--model", model, "--save", out, "--test_convert_precision")
    assert ran.code == 0, ran.err
    mine, theirs = (load_file(f / "model.safetensors") for f in (out, model))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[k], theirs[k]) for k in mine)
    assert f"wrote {out}" in ran.out
    assert "precision: float32, one rank, against transformers' Qwen3ForCausalLM, 256" in ran.out
    found = rows(ran.out)
    assert list(found) == PLACES
    assert all(largest >= mean for largest, mean, _ in found.values())
    assert found["embedding"] == [0.0, 0.0, 0.0]
    assert max(r[2] for r in found.values()) < 1e-4
    assert "top-1 agreement: 100.00% (256 of 256 tokens)" in ran.out
    assert "first over the tolerance" not in ran.out


def test_damage_is_found_at_its_layer(mcore, model, tmp_path):
    ran = mcore(
        "export", "--to_mcore", "--model", model, "--save", tmp_path / "out",
        "--test_convert_precision", before=damage(2),
    )  # fmt: skip
    assert ran.code == 1, ran.err
    found = rows(ran.out)
    assert found["layer_1"][2] < 1e-4 < found["layer_2"][2]
    assert "first over the tolerance" in next(
        line for line in ran.out.splitlines() if line.startswith("  layer 2")
    )
    assert ran.out.count("first over the tolerance") == 1
    assert (
        "error[MC808]: the converted model differs from transformers' Qwen3ForCausalLM" in ran.err
    )
    assert "first at layer 2" in ran.err
    assert "Traceback" not in ran.err


@pytest.mark.parametrize(
    "layout",
    [
        ["--tensor_model_parallel_size", 2, "--sequence_parallel"],
        ["--pipeline_model_parallel_size", 2],
        ["--context_parallel_size", 2],
    ],
    ids=["tp2-sp", "pp2", "cp2"],
)
def test_layouts(mcore, model, tmp_path, layout):
    """The same table, and a damaged weight is found on whichever rank holds it."""
    common = ["export", "--to_hf", "--model", model, *layout, "--test_convert_precision"]
    ran = mcore.ranks(2, *common, "--save", tmp_path / "out")
    assert ran.code == 0, ran.err
    found = rows(ran.out)
    assert list(found) == PLACES
    assert max(r[2] for r in found.values()) < 1e-4
    assert "(256 of 256 tokens)" in ran.out


def test_damage_is_found_across_stages(mcore, model, tmp_path):
    """The damaged weight is on the second pipeline stage."""
    ran = mcore.ranks(
        2, "export", "--to_hf", "--model", model, "--pipeline_model_parallel_size", 2,
        "--test_convert_precision", "--save", tmp_path / "out", each=damage_written,
    )  # fmt: skip
    assert ran.code == 1, ran.err
    assert "first at layer 3" in ran.err


@pytest.mark.parametrize(("compared", "over"), [("float32", 1e-5), ("bfloat16", 8e-2)])
def test_number_types(mcore, model, tmp_path, compared, over):
    """What is written keeps its type; only the comparison runs in the other."""
    half = tmp_path / "half"
    ran = mcore(
        "export", "--to_hf", "--model", model, "--torch_dtype", "bfloat16", "--save", half,
        "--test_convert_precision", "--test_convert_dtype", compared,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert load_file(half / "model.safetensors")["model.norm.weight"].dtype is torch.bfloat16
    assert f"precision: {compared}, " in ran.out
    found = rows(ran.out)
    assert max(r[2] for r in found.values()) < over
    assert list(found) == PLACES


def test_what_cannot_be_compared(mcore, model, model_copy, tmp_path):
    ran = mcore(
        "export", "--to_hf", "--model", model, "--save", tmp_path / "out",
        "--test_convert_precision", "--device_map", '{"": 7}',
    )  # fmt: skip
    refused(
        ran, "error[MC545]: transformers cannot run ", "fix: leave out --test_convert_precision"
    )
    assert (tmp_path / "out/model.safetensors").exists()


HEADS = {
    "scores": ("AutoModelForSequenceClassification", "Qwen3ForSequenceClassification"),
    "none": ("AutoModel", "Qwen3Model"),
}


@pytest.mark.parametrize("layout", ["one", "tp2"])
@pytest.mark.parametrize("head", HEADS)
def test_other_heads(mcore, model, tmp_path, head, layout):
    """A classifier's scores of every token, and the states of a model without a head."""
    import transformers

    opens, name = HEADS[head]
    labels = {"num_labels": 3} if head == "scores" else {}
    given = getattr(transformers, opens).from_pretrained(model, **labels)
    given.save_pretrained(tmp_path / "in")
    command = ["export", "--to_hf", "--model", tmp_path / "in", "--save", tmp_path / "out"]
    command += ["--test_convert_precision"]
    if layout == "one":
        ran = mcore(*command)
    else:
        ran = mcore.ranks(2, *command, "--tensor_model_parallel_size", 2)
    assert ran.code == 0, ran.err
    assert f"against transformers' {name}, 256 tokens" in ran.out
    found = rows(ran.out)
    assert list(found) == (PLACES if head == "scores" else PLACES[:-1])
    assert max(r[2] for r in found.values()) < 1e-4
    assert ("top-1 agreement: 100.00% (256 of 256 tokens)" in ran.out) == (head == "scores")
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("in", "out"))
    if head == "none":  # transformers saves a bare model without the prefix, and reads either
        before = {f"model.{k}": tensor for k, tensor in before.items()}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
