"""How runs end otherwise than by their last step: signals, killed ranks, ranks that hang."""

import importlib
import os
import signal
from pathlib import Path

import pytest
from commands import STEPS, free_port, losses, metrics, names, same_weights, until


def started(child, folder, steps=2):
    """The run folder, once the run below `folder` has taken some steps."""

    def find():
        assert child.alive(), child.err[-3000:]
        for run in folder.glob("v0-*"):
            if (run / "metrics.jsonl").exists() and len(metrics(run)) >= steps:
                return run
        return None

    return until(find, timeout=90)


@pytest.mark.parametrize("ranks", [1, 2])
def test_sigterm_saves_and_ends_well(mcore, sft, tmp_path, ranks):
    long = ["--train_iters", 100000, "--save", tmp_path / "stopped", "--nproc_per_node", ranks]
    child = mcore.start([*sft, *long])
    run = started(child, tmp_path / "stopped")
    child.kill(signal.SIGTERM)
    ran = child.wait()
    assert ran.code == 0, ran.err
    last = max(losses(run))
    assert f"SIGTERM: saved and stopped after step {last}" in ran.err
    kept = {n for n in names(run) if "checkpoint" in n}
    assert kept == {f"checkpoint-{last}"}
    assert "report.html" in names(run)
    again = ["--train_iters", last + 1, "--load", run, "--save", tmp_path / "goes-on"]
    ran = mcore(*sft, *again)
    assert ran.code == 0, ran.err
    assert sorted(losses(ran.folder())) == [last + 1]


def sigterm_in(module, owner, name):
    """Have the child send itself SIGTERM when it first calls something."""

    def before():
        place = getattr(importlib.import_module(module), owner)
        original = getattr(place, name)

        def called(*args, **options):
            setattr(place, name, original)
            os.kill(os.getpid(), signal.SIGTERM)
            return original(*args, **options)

        setattr(place, name, called)

    return before


def test_sigterm_in_the_first_step(mcore, sft, plain, tmp_path):
    """The step is taken to its end and saved; the rest of the run gives what it had given."""
    save = ["--save", tmp_path / "stopped", "--add_version", "false"]
    first = sigterm_in("mcore_sft.recipe", "SFTRecipe", "loss")
    ran = mcore(*sft, *STEPS, *save, before=first)
    assert ran.code == 0, ran.err
    assert "SIGTERM: saved and stopped after step 1" in ran.err
    stopped = tmp_path / "stopped"
    assert {n for n in names(stopped) if "checkpoint" in n} == {"checkpoint-1"}
    assert losses(stopped) == {1: losses(plain)[1]}
    ran = mcore(*sft, *STEPS, *save, "--load", stopped)
    assert ran.code == 0, ran.err
    assert losses(stopped) == losses(plain)
    assert same_weights(stopped / "checkpoint-6", plain / "checkpoint-6")


def test_sigterm_before_the_first_step(mcore, sft, plain, tmp_path):
    """There is nothing to save: the process ends at once, and the same command begins anew."""
    save = ["--save", tmp_path / "stopped", "--add_version", "false"]
    early = sigterm_in("mcore_core.train.session", "folders", "write_facts")
    ran = mcore(*sft, *STEPS, *save, before=early)
    assert ran.code == -signal.SIGTERM, ran.err
    assert not [n for n in names(tmp_path / "stopped") if "checkpoint" in n]
    ran = mcore(*sft, *STEPS, *save)
    assert ran.code == 0, ran.err
    assert losses(tmp_path / "stopped") == losses(plain)


def test_sigterm_in_the_last_evaluation(mcore, sft, dataset, tmp_path):
    """All steps have been taken: the run ends as it would have, with its checkpoint."""
    options = ["--train_iters", 2, "--val_dataset", dataset, "--eval_interval", 2]
    last = sigterm_in("mcore_core.train.step", "Stepper", "evaluate")
    ran = mcore(*sft, *options, "--save", tmp_path / "ended", before=last)
    assert ran.code == 0, ran.err
    assert "checkpoint-2" in names(ran.folder())


def test_a_killed_rank_is_named(mcore, sft, tmp_path):
    long = ["--train_iters", 100000, "--save", tmp_path / "killed", "--nproc_per_node", 2]
    child = mcore.start([*sft, *long])
    started(child, tmp_path / "killed")
    os.kill(rank_process(child.pid, "1"), signal.SIGKILL)
    ran = child.wait(60)
    assert ran.code == 1
    assert "error[MC623]: rank 1 ended first, with signal SIGKILL" in ran.err
    assert "Traceback" not in ran.err


def test_a_rank_that_hangs_is_named(mcore, sft, tmp_path):
    """Rank 1 stands still in the first step: after the time-out rank 0 says so."""

    def hang():
        from mcore_sft.recipe import SFTRecipe

        if os.environ["RANK"] == "1":
            SFTRecipe.loss = lambda *_: os.kill(os.getpid(), signal.SIGSTOP)

    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    options = ["--train_iters", 3, "--ddp_timeout", 8, "--save", tmp_path / "hung"]
    first, second = (
        mcore.start(
            [*sft, *options], env={**shared, "RANK": str(r), "LOCAL_RANK": str(r)}, before=hang
        )
        for r in range(2)
    )
    try:
        ran = first.wait(90)
    finally:
        second.kill()
        second.wait()
    assert ran.code == 1, ran.err
    assert "error[MC803]: rank 0 lost the others in step 1" in ran.err
    assert "rank 1 died or hung: look for its own error first" in ran.err
    assert "Traceback" not in ran.err


def rank_process(launcher, rank):
    """The process of a rank below a launcher."""
    waiting = [launcher]
    while waiting:
        pid = waiting.pop()
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        if f"RANK={rank}".encode() in environment:
            return pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text()
        waiting += [int(word) for word in children.split()]
    raise AssertionError(f"no process of rank {rank}")
