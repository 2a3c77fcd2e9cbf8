"""A loss that is not finite, and batches in which nothing trains: a message each, no lost work."""

import json

import pytest
import torch
from commands import losses
from safetensors.torch import load_file


def spoil(recipe_loss):
    """Change what the sft loss returns, in the child."""

    def before():
        from mcore_sft.recipe import SFTRecipe

        original = SFTRecipe.loss
        SFTRecipe.loss = lambda self, *args: recipe_loss(original(self, *args))

    return before


def weightless(steps):
    """Let no token of these batches train: counted from 1, by collated micro-batch."""

    def before():
        import dataclasses

        from mcore_sft.recipe import SFTRecipe

        original, seen = SFTRecipe.collate, [0]

        def collate(self, units):
            seen[0] += 1
            batch = original(self, units)
            if seen[0] not in steps:
                return batch
            zeros = torch.zeros_like(batch.weights_T)
            return dataclasses.replace(batch, weights_T=zeros, count_T=zeros)

        SFTRecipe.collate = collate

    return before


@pytest.fixture
def run(mcore, model, dataset, tmp_path):
    def start(before, *more):
        return mcore(
            "run", "--plugin", "sft", "--model", model, "--dataset", dataset, "--num_workers", 0,
            "--micro_batch_size", 4, "--global_batch_size", 4, "--lr", "1e-3", "--train_iters", 12,
            "--save", tmp_path / "run", "--add_version", "false", "--save_interval", 2, *more,
            before=before,
        )  # fmt: skip

    return start


def test_a_loss_that_is_not_a_number(run, tmp_path):
    """From step 4 on: the checkpoint of step 2 is whole, and no later one is written."""
    import dataclasses

    seen = []

    def nan_later(out):
        seen.append(out.total.requires_grad)
        late = sum(seen) >= 4
        return dataclasses.replace(out, total=out.total * float("nan")) if late else out

    ran = run(spoil(nan_later))
    assert ran.code == 1, ran.err
    assert "error[MC802]: step 4: the loss is nan" in ran.err
    assert "the optimizer step was not taken: checkpoints hold finite weights" in ran.err
    assert "Traceback" not in ran.err
    saved = load_file(tmp_path / "run/checkpoint-2/model.safetensors")
    assert all(torch.isfinite(w).all() for w in saved.values())
    assert sorted(p.name for p in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-2"]
    assert (tmp_path / "run/report.html").exists()


def test_gradients_that_are_not_numbers(run, tmp_path):
    """With a loss that is one: the step is taken in memory, and never saved."""
    import dataclasses

    seen = []

    def steep_later(out):
        seen.append(out.total.requires_grad)
        steep = out.total + (0 * out.total).sqrt()  # its value, and a gradient of 0 / 0
        return dataclasses.replace(out, total=steep) if sum(seen) >= 4 else out

    ran = run(spoil(steep_later))
    assert ran.code == 1, ran.err
    assert "error[MC804]: step 4: the loss is " in ran.err
    assert "the norm of its gradients nan" in ran.err
    assert "Traceback" not in ran.err
    assert sorted(p.name for p in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-2"]
    weights = load_file(tmp_path / "run/checkpoint-2/model.safetensors")
    assert all(torch.isfinite(w).all() for w in weights.values())


def test_an_update_that_overflows(run, tmp_path):
    """Torch's own words for it do not say which option is too large."""
    ran = run(None, "--optimizer", "sgd", "--weight_decay", "1e50")
    assert ran.code == 1, ran.err
    assert "error[MC805]: step 1: the update is too large" in ran.err
    assert ", weight decay 1e+50\n" in ran.err
    assert "Traceback" not in ran.err
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_batch_in_which_nothing_trains_changes_nothing(run, tmp_path):
    ran = run(weightless({3}))
    assert ran.code == 0, ran.err
    assert "warning: step 3: no token of its global batch trains; nothing was changed" in ran.err
    lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    third = next(x for x in lines if x["step"] == 3)
    assert third["loss"] is None
    assert third["nonfinite"] == {"loss": "nan"}
    assert third["grad_norm"] == 0.0
    assert len(losses(tmp_path / "run")) == 12


def test_nothing_but_such_batches_ends_the_run(run):
    ran = run(weightless(set(range(1, 100))))
    assert ran.code == 1, ran.err
    assert "error[MC801]: step 8: no token of the last 8 global batches trains" in ran.err
    assert "Traceback" not in ran.err
