"""LoRA as users run it: train, kill, resume, merge, export, go on from adapters; and mistakes."""

import hashlib
import json
import shutil

import pytest
import torch
from commands import losses, metrics
from safetensors.torch import load_file
from test_bad_input import refused
from test_kill import moves, same, training_state

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="session")
def lora(sft):
    return [*sft, "--tuner_type", "lora", "--add_version", "false"]


@pytest.fixture(scope="session")
def trained(mcore, lora, place):
    """A finished run of six steps, with dropout."""
    save = place / "lora"
    ran = mcore(*lora, "--train_iters", 6, "--save_interval", 3, "--save", save)
    assert ran.code == 0, ran.err
    return save


def delta(adapter, config, module):
    """PEFT's W' - W of a linear layer."""
    name = f"base_model.model.{module}"
    a, b = (adapter[f"{name}.lora_{x}.weight"].float() for x in "AB")
    return config["lora_alpha"] / config["r"] * b @ a


def test_a_checkpoint_has_adapter_merged_model_and_only_what_trains(trained, model, tmp_path):
    checkpoint = trained / "checkpoint-6"
    assert not (checkpoint / "model.safetensors").exists()
    adapter = load_file(checkpoint / WEIGHTS)
    config = json.loads((checkpoint / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (8, 32, 0.05)
    assert config["base_model_name_or_path"] == str(model)
    assert set(config["target_modules"]) == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    assert len(adapter) == 4 * 7 * 2
    assert all(tensor.abs().max() > 0 for tensor in adapter.values())
    base, merged = (
        load_file(model / "model.safetensors"),
        load_file(trained / "checkpoint-6-merged/model.safetensors"),
    )
    assert merged.keys() == base.keys()
    for name, weight in base.items():
        module = name.removesuffix(".weight")
        change = 0
        if f"base_model.model.{module}.lora_A.weight" in adapter:
            change = delta(adapter, config, module)
            assert change.abs().max() > 0
        torch.testing.assert_close(merged[name], weight + change, rtol=1e-6, atol=1e-7)
    state = training_state(checkpoint, tmp_path / "scratch")
    tensors = [n for n, v in state.items() if isinstance(v, torch.Tensor) and v.dim() == 2]
    assert tensors
    assert all(".adapter." in name for name in tensors)


def test_the_summary_names_both(mcore, lora, trained):
    command = [*lora, "--train_iters", 6, "--save", trained, "--load", trained]
    ran = mcore(*command)
    assert ran.code == 0, ran.err
    assert "checkpoint-6-merged" in ran.out + ran.err


def test_killed_and_resumed_is_uninterrupted(mcore, lora, tmp_path):
    """In bfloat16: the float32 numbers of which the adapters are a rounding come back too."""
    common = [*lora, "--train_iters", 10, "--save_interval", 2, "--merge_lora", "false"]
    common += ["--lora_dropout", 0.2, "--modules_to_save", "norm", "--torch_dtype", "bfloat16"]
    whole = mcore(*common, "--save", tmp_path / "whole")
    assert whole.code == 0, whole.err
    save = tmp_path / "killed"
    command = [*common, "--save", save, "--load", save, "--exit_on_missing_checkpoint", "false"]
    child = mcore.start(command)
    moves(child, save, 0)
    child.kill()
    assert child.wait().code == -9
    ran = mcore(*command)
    assert ran.code == 0, ran.err
    last = "checkpoint-10"
    mine, expected = (load_file(p / last / WEIGHTS) for p in (save, tmp_path / "whole"))
    assert mine.keys() == expected.keys()
    assert any(name.endswith("model.norm.weight") for name in expected)
    assert all(torch.equal(mine[name], expected[name]) for name in expected)
    mine = training_state(save / last, tmp_path / "scratch")
    expected = training_state(tmp_path / "whole" / last, tmp_path / "scratch")
    assert mine.keys() == expected.keys()
    assert [name for name in expected if not same(mine[name], expected[name])] == []
    assert losses(save) == losses(tmp_path / "whole")


def base_bits(log):
    """Write a line at each save: a hash of the model's own weights as they are in memory."""

    def before():
        from mcore_sft.tuners.lora.tuner import Lora

        from mcore_core.model.names import named_weights

        original = Lora.merged

        def merged(self, chunks):
            digest = hashlib.sha256()
            for name, weight in sorted(named_weights(chunks).items()):
                digest.update(name.encode() + weight.detach().view(torch.uint8).numpy().tobytes())
            with log.open("a") as out:
                out.write(digest.hexdigest() + "\n")
            return original(self, chunks)

        Lora.merged = merged

    return before


def test_fifty_merged_saves_leave_the_base_as_it_was(mcore, lora, model, tmp_path):
    """In bfloat16, where merging in place would drift: W + dW once is what the last save has."""
    ran = mcore(
        *lora, "--train_iters", 50, "--save_interval", 1, "--save_retain_interval", 50,
        "--save", tmp_path / "run", "--torch_dtype", "bfloat16", "--no_save_optim",
        "--global_batch_size", 2, before=base_bits(tmp_path / "bits"), timeout=250,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    bits = (tmp_path / "bits").read_text().split()
    assert len(bits) == 50
    assert len(set(bits)) == 1
    folders = sorted(p.name for p in (tmp_path / "run").iterdir() if "checkpoint" in p.name)
    assert folders == ["checkpoint-50", "checkpoint-50-merged"]
    checkpoint = tmp_path / "run/checkpoint-50"
    adapter = load_file(checkpoint / WEIGHTS)
    config = json.loads((checkpoint / "adapter_config.json").read_text())
    merged = load_file(tmp_path / "run/checkpoint-50-merged/model.safetensors")
    for name, weight in load_file(model / "model.safetensors").items():
        base, module = weight.bfloat16(), name.removesuffix(".weight")
        if f"base_model.model.{module}.lora_A.weight" not in adapter:
            assert torch.equal(merged[name], base), name
            continue
        expected = (base.float() + delta(adapter, config, module)).bfloat16()
        assert not torch.equal(expected, base)
        differ = (merged[name] != expected).float().mean()
        assert differ < 1e-3, (name, differ)  # the order of sums in float32 differs


EXPORTS = {
    "--adapters": lambda run, model: ["--model", model, "--adapters", run / "checkpoint-6"],
    "--load": lambda run, model: ["--load", run],
}


@pytest.mark.parametrize("way", EXPORTS)
def test_export_merges(mcore, trained, model, tmp_path, way):
    out = tmp_path / "out"
    ran = mcore("export", "--to_hf", *EXPORTS[way](trained, model), "--save", out)
    assert ran.code == 0, ran.err
    mine, beside = (
        load_file(out / "model.safetensors"),
        load_file(trained / "checkpoint-6-merged/model.safetensors"),
    )
    assert mine.keys() == beside.keys()
    assert all(torch.equal(mine[name], beside[name]) for name in beside)


def test_export_to_mcore_and_back(mcore, trained, model, tmp_path):
    given = ["--model", model, "--adapters", trained / "checkpoint-6"]
    for argv in (
        ["--to_mcore", *given, "--save", tmp_path / "state"],
        ["--to_hf", "--load", tmp_path / "state", "--save", tmp_path / "back"],
    ):
        ran = mcore("export", *argv)
        assert ran.code == 0, ran.err
    mine = load_file(tmp_path / "back/model.safetensors")
    beside = load_file(trained / "checkpoint-6-merged/model.safetensors")
    assert all(torch.equal(mine[name], beside[name]) for name in beside)


def test_export_of_a_model_to_mcore_and_back(mcore, model, tmp_path):
    """With what lies beside the weights; and where the folders were mixed up."""
    state, back = tmp_path / "state", tmp_path / "back"
    ran = mcore("export", "--to_mcore", "--model", model, "--save", state)
    assert ran.code == 0, ran.err
    ran = mcore("export", "--to_hf", "--load", state, "--save", back)
    assert ran.code == 0, ran.err
    assert {p.name for p in back.iterdir()} == {p.name for p in model.iterdir()}
    mine, theirs = (load_file(folder / "model.safetensors") for folder in (back, model))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    ran = mcore("export", "--to_hf", "--load", model, "--save", tmp_path / "none")
    refused(
        ran,
        f"error[MC702]: --load {model} holds a model, and no checkpoint of a run",
        f"fix: --model {model}, which takes Hugging Face models",
    )
    ran = mcore("export", "--to_hf", "--model", model, "--save", "/proc/none")
    refused(ran, "error[MC708]: --save /proc/none cannot be written: ")


def test_an_adapter_is_exported_alone(mcore, trained, model, tmp_path):
    given = ["--model", model, "--adapters", trained / "checkpoint-6", "--merge_lora", "false"]
    ran = mcore("export", "--to_hf", *given, "--save", tmp_path / "out")
    assert ran.code == 0, ran.err
    mine, theirs = (
        load_file(tmp_path / "out" / WEIGHTS),
        load_file(trained / "checkpoint-6" / WEIGHTS),
    )
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert not (tmp_path / "out/model.safetensors").exists()


def test_a_run_goes_on_from_either_format(mcore, sft, trained, tmp_path):
    """--adapters (PEFT's) and --adapter_load (ours) begin alike, at step 1 with the default lr."""
    plain = [x for i, x in enumerate(sft) if "--lr" not in (x, sft[i - 1])]
    common = [*plain, "--train_iters", 2, "--lora_dropout", 0, "--add_version", "false"]
    peft = mcore(*common, "--adapters", trained / "checkpoint-6", "--save", tmp_path / "peft")
    assert peft.code == 0, peft.err
    assert "tuner_type is lora" in peft.err
    ours = mcore(
        *common, "--tuner_type", "lora", "--adapter_load", trained, "--save", tmp_path / "ours"
    )
    assert ours.code == 0, ours.err
    assert losses(tmp_path / "peft") == losses(tmp_path / "ours")
    assert losses(tmp_path / "peft")[1] < losses(trained)[1]
    assert metrics(tmp_path / "peft")[0]["lr"] == pytest.approx(1e-4, rel=0.5)
    again = mcore("run", tmp_path / "peft/run.yaml", "--save", tmp_path / "again")
    assert again.code == 0, again.err
    assert losses(tmp_path / "again") == losses(tmp_path / "peft")


def test_mistakes(mcore, lora, sft, trained, model, tmp_path):
    other = shutil.copytree(trained / "checkpoint-6", tmp_path / "other")
    tensors = load_file(other / WEIGHTS)
    from safetensors.torch import save_file

    name = next(n for n in tensors if "q_proj.lora_A" in n)
    save_file({**tensors, name: tensors[name][:, :-2].contiguous()}, other / WEIGHTS)
    cases = [
        ([*lora, "--target_modules", "q_prj"], ["MC554", "q_prj", "q_proj", "linear_qkv"]),
        ([*lora, "--lora_rank", 0], ["MC302", "--lora_rank"]),
        ([*lora, "--lora_rank", -3], ["MC302", "--lora_rank"]),
        ([*sft, "--lora_rank", 4], ["MC321", "--tuner_type lora"]),
        ([*sft, "--tuner_type", "lorra"], ["MC202", "lorra", "lora"]),
        ([*sft, "--adapters", model], ["MC550", "adapter_config.json"]),
        ([*sft, "--adapters", other], ["MC555", "q_proj.lora_A", "[8, 48]", "[8, 46]"]),
        (
            [*sft, "--adapters", trained / "checkpoint-6", "--lora_rank", 4],
            ["MC553", "--lora_rank 4"],
        ),
        ([*sft, "--load", trained], ["MC707", "tuner_type"]),
        ([*lora, "--lora_rank", 4, "--load", trained], ["MC707", "lora_rank: 8 there, 4"]),
        ([*lora, "--modules_to_save", "q_proj"], ["MC556", "q_proj"]),
        ([*lora, "--modules_to_save", "lm_hed"], ["MC554", "lm_hed"]),
        ([*lora, "--modules_to_save", "embed_tokens"], ["MC556", "one weight"]),
        (
            [*lora, "--target_modules", "embed_tokens", "--merge_lora", "true"],
            ["MC557", "one weight"],
        ),
        ([*sft, "--freeze_parameters", "model.layer.0"], ["MC559", "model.layer.0"]),
        ([*sft, "--freeze_parameters_ratio", 1], ["MC559", "every parameter"]),
        ([*sft, "--freeze_parameters_regex", "q_proj"], ["MC559", "k_proj"]),
        ([*sft, "--trainable_parameters", "model"], ["MC321", "--freeze_parameters"]),
    ]
    for number, (argv, texts) in enumerate(cases):
        save = ["--save", tmp_path / f"run{number}", "--add_version", "false"]
        given = [x for x in argv if x not in ("--add_version", "false")]
        ran = mcore(*given, "--train_iters", 1, *save)
        assert ran.code == 2, (argv, ran.err)
        assert "Traceback" not in ran.err, ran.err
        for text in texts:
            assert text in ran.err, (argv, ran.err)
