"""Checkpoints that cannot be read or written: one clear message, exit code 2, nothing lost."""

import errno
import os
import resource
import signal

import pytest
from commands import refused
from conftest import make_model


def test_a_checkpoint_of_another_model(start, tmp_path):
    ran = start()
    assert ran.code == 0, ran.err
    other = make_model(tmp_path / "other", num_hidden_layers=2, intermediate_size=96)
    refused(
        start("--load", ran.folder(), model=other),
        f"error[MC706]: {ran.folder()}/checkpoint-2 is a checkpoint of another model\n"
        "  num_layers: 4 there, 2 in --model\n"
        "  ffn_hidden_size: 64 there, 96 in --model\n"
        "  fix: --model with the model that the run was started from\n",
    )


def test_no_checkpoint_to_load(start, tmp_path):
    refused(
        start("--load", tmp_path / "nothing"),
        f"error[MC701]: --load {tmp_path}/nothing: no such folder\n"
        "  fix: give the run folder of an earlier run (its --save) or one of its checkpoint-N\n",
    )
    (tmp_path / ".partial-checkpoint-7").mkdir()
    refused(
        start("--load", tmp_path),
        f"error[MC702]: --load {tmp_path} holds no complete checkpoint\n",
        "\n  unfinished and not usable: .partial-checkpoint-7\n",
    )


def test_a_run_folder_that_cannot_be_made(mcore, model, dataset):
    """It shows only when it is made: as root, or on a file system that takes no files."""
    ran = mcore(
        "run", "--plugin", "sft", "--model", model, "--dataset", dataset, "--train_iters", 1,
        "--save", "/proc/run",
    )  # fmt: skip
    refused(ran, "error[MC708]: the run folder /proc/run/v0-", "cannot be written: No such file")


@pytest.mark.parametrize("background", ["false", "true"])
@pytest.mark.parametrize("limit", [60_000, 400_000])
def test_a_full_disk_while_saving(start, tmp_path, limit, background):
    """Files above a limit cannot be written: first the safetensors, then the training state."""
    ran = start("--add_version", "false", "--train_iters", 1)
    assert ran.code == 0, ran.err
    before = {p: p.read_bytes() for p in (tmp_path / "run/checkpoint-1").rglob("*") if p.is_file()}

    def full_disk():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    load = ["--add_version", "false", "--load", tmp_path / "run", "--async_save", background]
    ran = start(*load, before=full_disk)
    if limit < 300_000:
        refused(
            ran,
            f"error[MC540]: cannot write the model to {tmp_path}/run/.partial-checkpoint-2: ",
            os.strerror(errno.EFBIG),
            "\n  fix: make room there, or save elsewhere\n",
        )
    else:
        refused(
            ran,
            "error[MC703]: checkpoint-2 could not be written: a write failed, most likely because "
            f"the disk is full\n  folder: {tmp_path}/run (",
            "\n  earlier checkpoints are complete and usable with --load\n"
            "  fix: free space or choose another --save; --save_retain_interval deletes old "
            "checkpoints, --no_save_optim makes them smaller\n",
        )
    assert not (tmp_path / "run/.partial-checkpoint-2").exists()
    assert not (tmp_path / "run/checkpoint-2").exists()
    assert all(p.read_bytes() == content for p, content in before.items())
    ran = start("--add_version", "false", "--load", tmp_path / "run")
    assert ran.code == 0, ran.err
    assert (tmp_path / "run/checkpoint-2/training.json").exists()
