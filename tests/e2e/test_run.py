"""`mcore run --plugin sft` from end to end: its files, its numbers, how it ends and goes on."""

import json
import re

import pytest
import torch
from commands import STEPS, losses, metrics, names, same_weights


def test_files_of_a_run(plain, place):
    assert plain.parent == place / "plain"
    assert re.fullmatch(r"v0-\d{8}-\d{6}", plain.name)
    assert names(plain) == {
        "run.yaml",
        "run.json",
        "metrics.jsonl",
        "runs",
        "report.html",
        "checkpoint-3",
        "checkpoint-6",
    }
    for step in (3, 6):
        checkpoint = plain / f"checkpoint-{step}"
        assert names(checkpoint) == {
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
            "run.yaml",
            "training.json",
            "mcore",
        }
        training = json.loads((checkpoint / "training.json").read_text())
        assert training["step"] == step
        assert training["train_iters"] == 6
        assert training["plugins"]["sft"] == {"package": "mcore-sft", "version": "0.1.0"}
        assert (checkpoint / "run.yaml").read_text() == (plain / "run.yaml").read_text()
    facts = json.loads((plain / "run.json").read_text())
    assert facts["world_size"] == 1
    assert facts["data"]["train"]["rows"] == 160
    assert facts["plugins"].keys() >= {"sft", "bridge"}


def test_metrics(plain):
    lines = metrics(plain)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines:
        assert line.keys() >= {
            "step", "epoch", "loss", "lr", "grad_norm", "tokens", "tokens_per_second"
        }  # fmt: skip
        assert line["epoch"] == pytest.approx(line["step"] / 20)
        assert line["tokens"] > 0
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[0]["lr"] <= 1e-3


def test_run_yaml_repeats_the_run(mcore, plain, tmp_path):
    ran = mcore("run", plain / "run.yaml", "--save", tmp_path / "again")
    assert ran.code == 0, ran.err
    assert losses(ran.folder()) == losses(plain)
    assert same_weights(ran.folder() / "checkpoint-6", plain / "checkpoint-6")


def reference_loss(folder, dataset, rows, *, all_tokens):
    """The loss of transformers over the targets of some rows, one sequence at a time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    total, count = 0.0, 0
    for line in dataset.read_text().splitlines()[:rows]:
        messages = json.loads(line)["messages"]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        answer = text.index(messages[-1]["content"] + "<|im_end|>")
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        prompt = len(tokenizer(text[:answer], add_special_tokens=False).input_ids)
        with torch.no_grad():
            logps = model(ids).logits[0, :-1].log_softmax(-1)
        picked = logps.gather(-1, ids[0, 1:, None])[:, 0]
        # the newline after the end of the turn does not train
        picked = picked if all_tokens else picked[prompt - 1 : -1]
        total, count = total - picked.double().sum().item(), count + len(picked)
    return total / count


@pytest.mark.parametrize("scale", ["default", "all"])
def test_the_export_gives_transformers_the_same_loss(mcore, plain, dataset, tmp_path, scale):
    """One packed row of eight samples; weights from the export, and from the training state."""
    checkpoint = plain / "checkpoint-6"
    once = [
        "--dataset", dataset, "--dataset_shuffle", "false", "--train_dataloader_shuffle", "false",
        "--micro_batch_size", 8, "--global_batch_size", 8, "--train_iters", 1, "--num_workers", 0,
        "--loss_scale", scale,
    ]  # fmt: skip
    ran = mcore("run", "--plugin", "sft", "--model", checkpoint, *once, "--save", tmp_path / "hf")
    assert ran.code == 0, ran.err
    mine = losses(ran.folder())[1]
    expected = reference_loss(checkpoint, dataset, 8, all_tokens=scale == "all")
    assert mine == pytest.approx(expected, abs=1e-4)
    state = ["--model", checkpoint, "--load", checkpoint, "--finetune"]
    ran = mcore("run", "--plugin", "sft", *state, *once, "--save", tmp_path / "state")
    assert ran.code == 0, ran.err
    assert losses(ran.folder())[1] == mine


def test_two_ranks_give_the_losses_of_one(mcore, sft, plain, tmp_path):
    """The launcher starts the ranks."""
    layout = ["--nproc_per_node", 2, "--tensor_model_parallel_size", 2, "--sequence_parallel"]
    ran = mcore(*sft, *STEPS, *layout, "--save", tmp_path / "tp2")
    assert ran.code == 0, ran.err
    assert losses(ran.folder()) == pytest.approx(losses(plain), rel=1e-5)
    assert "2 ranks: tp2" in ran.err + ran.out
    assert names(ran.folder()) == names(plain)


def test_resume_repeats_the_run(mcore, sft, plain, tmp_path):
    ran = mcore(*sft, *STEPS, "--load", plain / "checkpoint-3", "--save", tmp_path / "resumed")
    assert ran.code == 0, ran.err
    later = {step: loss for step, loss in losses(plain).items() if step > 3}
    assert losses(ran.folder()) == later
    assert same_weights(ran.folder() / "checkpoint-6", plain / "checkpoint-6")


@pytest.mark.parametrize("layout", ["tensor", "pipeline", "data"])
def test_resume_at_another_layout(mcore, sft, plain, tmp_path, layout):
    sizes = [] if layout == "data" else [f"--{layout}_model_parallel_size", 2]
    load = ["--load", plain / "checkpoint-3", "--save", tmp_path / "resumed"]
    ran = mcore.ranks(2, *sft, *STEPS, *load, *sizes)
    assert ran.code == 0, ran.err
    later = {step: loss for step, loss in losses(plain).items() if step > 3}
    assert losses(ran.folder()) == pytest.approx(later, rel=1e-5)


def test_finetune_starts_anew_from_the_weights(mcore, sft, plain, tmp_path):
    load = ["--load", plain, "--finetune", "--save", tmp_path / "tuned"]
    ran = mcore(*sft, *STEPS, *load)
    assert ran.code == 0, ran.err
    found, before = metrics(ran.folder()), metrics(plain)
    assert [line["step"] for line in found] == [1, 2, 3, 4, 5, 6]
    assert [line["lr"] for line in found] == [line["lr"] for line in before]
    assert [line["tokens"] for line in found] == [line["tokens"] for line in before]
    assert found[0]["loss"] < before[0]["loss"]


def test_without_optimizer_a_checkpoint_cannot_resume(mcore, sft, tmp_path):
    save = ["--save", tmp_path / "bare", "--add_version", "false"]
    ran = mcore(*sft, "--train_iters", 2, "--no_save_optim", *save)
    assert ran.code == 0, ran.err
    again = [*sft, "--train_iters", 3, "--load", tmp_path / "bare", "--save", tmp_path / "more"]
    ran = mcore(*again)
    assert ran.code == 2
    assert (
        f"error[MC704]: {tmp_path}/bare/checkpoint-2 was saved with --no_save_optim: training "
        "cannot resume exactly\n"
        "  fix: --no_load_optim starts with a fresh optimizer, --finetune also at step 0\n"
    ) in ran.err
    ran = mcore(*again, "--no_load_optim")
    assert ran.code == 0, ran.err
    assert [line["step"] for line in metrics(ran.folder())] == [3]


def test_retention(mcore, sft, tmp_path):
    save = ["--save", tmp_path / "kept", "--save_interval", 1, "--save_retain_interval", 2]
    ran = mcore(*sft, "--train_iters", 5, *save)
    assert ran.code == 0, ran.err
    kept = {n for n in names(ran.folder()) if "checkpoint" in n}
    assert kept == {"checkpoint-2", "checkpoint-4", "checkpoint-5"}


def test_a_persistent_worker_needs_a_gpu(mcore, sft, tmp_path):
    save = ["--async_save", "--use_persistent_ckpt_worker", "--save", tmp_path / "refused"]
    ran = mcore(*sft, *STEPS, *save)
    assert ran.code == 2
    assert "error[MC312]: --use_persistent_ckpt_worker true needs a CUDA GPU" in ran.err


def test_saving_in_the_background(mcore, sft, plain, tmp_path):
    ran = mcore(*sft, *STEPS, "--async_save", "--save", tmp_path / "async")
    assert ran.code == 0, ran.err
    assert names(ran.folder()) == names(plain)
    assert losses(ran.folder()) == losses(plain)
    load = ["--load", ran.folder() / "checkpoint-3", "--save", tmp_path / "resumed"]
    again = mcore(*sft, *STEPS, *load)
    assert again.code == 0, again.err
    assert same_weights(again.folder() / "checkpoint-6", plain / "checkpoint-6")


def test_evaluation(mcore, sft, tmp_path):
    split = ["--split_dataset_ratio", 0.1, "--eval_interval", 2]
    ran = mcore(*sft, "--train_iters", 5, *split, "--save", tmp_path / "evaluated")
    assert ran.code == 0, ran.err
    facts = json.loads((ran.folder() / "run.json").read_text())["data"]
    assert (facts["train_items"], facts["val_items"]) == (144, 16)
    found = [line for line in metrics(ran.folder()) if "eval/loss" in line]
    assert [line["step"] for line in found] == [2, 4, 5]
    assert found[-1]["eval/loss"] < found[0]["eval/loss"]


def test_streaming_and_resuming(mcore, sft, tmp_path):
    """The stream is read again and what was consumed is skipped: the losses are the same."""
    common = [*sft, "--streaming", "--shuffle_buffer_size", 30, "--packing", "--packing_length", 60]
    common += ["--train_iters", 4, "--save_interval", 2, "--add_version", "false"]
    ran = mcore(*common, "--save", tmp_path / "stream")
    assert ran.code == 0, ran.err
    whole = losses(tmp_path / "stream")
    assert sorted(whole) == [1, 2, 3, 4]
    load = tmp_path / "stream/checkpoint-2"
    resumed = mcore(*common, "--save", tmp_path / "resumed", "--load", load)
    assert resumed.code == 0, resumed.err
    assert losses(tmp_path / "resumed") == {step: whole[step] for step in (3, 4)}


def test_saving_by_epoch(mcore, sft, dataset, tmp_path):
    options = [o if o != dataset else f"{dataset}#16" for o in sft]
    epochs = ["--max_epochs", 3, "--save_strategy", "epoch", "--save", tmp_path / "epochs"]
    ran = mcore(*options, *epochs)
    assert ran.code == 0, ran.err
    kept = {n for n in names(ran.folder()) if "checkpoint" in n}
    assert kept == {"checkpoint-2", "checkpoint-4", "checkpoint-6"}


def test_workers_change_nothing(mcore, sft, plain, tmp_path):
    options = [
        2 if before == "--num_workers" else o
        for before, o in zip(["", *sft[:-1]], sft, strict=True)
    ]
    ran = mcore(*options, *STEPS, "--save", tmp_path / "workers")
    assert ran.code == 0, ran.err
    assert losses(ran.folder()) == losses(plain)
