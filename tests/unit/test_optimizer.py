"""The CPU's FusedAdam against torch's AdamW, and learning rates against closed forms."""

import math
from types import SimpleNamespace

import pytest

from mcore_core import compat

compat.apply()  # before anything imports megatron

import torch  # noqa: E402

from mcore_core.config.kernel import kernel_config  # noqa: E402
from mcore_core.config.settle import settle  # noqa: E402
from mcore_core.platform.cpu_adam import FusedAdam  # noqa: E402
from mcore_core.train.optimizer import (  # noqa: E402
    FULL_LR,
    build_schedule,
    peak_lr,
    uses_distributed_optimizer,
)


def test_learning_rates_that_nobody_gave():
    """LoRA's is ten times that of all weights, also where --adapters made it a LoRA run."""
    adapted, _ = settle(kernel_config(adapters=["folder"]))
    rates = [peak_lr(kernel_config()), peak_lr(kernel_config(tuner_type="lora")), peak_lr(adapted)]
    assert rates == [1e-5, 1e-4, 1e-4]
    assert peak_lr(kernel_config(tuner_type="lora", lr=3e-5)) == 3e-5


OPTIONS = [
    {},
    {"lr": 0.02, "betas": (0.8, 0.9), "eps": 1e-4},
    {"lr": 0.02, "weight_decay": 0.3},
    {"weight_decay": 0.3, "adam_w_mode": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_fused_adam_equals_torch(options):
    shapes = [(3, 4), (5,), ()]
    ours = [torch.nn.Parameter(torch.randn(s)) for s in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    plain = {k: v for k, v in {"lr": 1e-3, "weight_decay": 0.0, **options}.items()}
    decoupled = plain.pop("adam_w_mode", True)
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    a, b = FusedAdam(ours, **options), kind(theirs, **plain)
    for step in range(12):
        for x, y in zip(ours, theirs, strict=True):
            x.grad = torch.randn_like(x) * 10 ** (step % 3)
            y.grad = x.grad.clone()
        a.step()
        b.step()
    for x, y in zip(ours, theirs, strict=True):
        assert torch.allclose(x, y, rtol=1e-5, atol=1e-7)
        assert torch.allclose(a.state[x]["exp_avg"], b.state[y]["exp_avg"], rtol=1e-5)
        assert torch.allclose(a.state[x]["exp_avg_sq"], b.state[y]["exp_avg_sq"], rtol=1e-5)


def test_fused_adam_keeps_one_step_for_a_group():
    used, unused = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    adam = FusedAdam([used, unused], lr=0.1)
    used.grad = torch.ones(2)
    adam.step()
    adam.step()
    assert adam.param_groups[0]["step"] == 2
    assert set(adam.state[used]) == {"exp_avg", "exp_avg_sq"}
    assert unused not in adam.state
    assert unused.tolist() == [1.0, 1.0]


def test_fused_adam_resumes_to_the_bit():
    def run(steps, state=None, value=None):
        p = torch.nn.Parameter(torch.ones(4) if value is None else value.clone())
        adam = FusedAdam([p], lr=0.1, weight_decay=0.1)
        if state is not None:
            adam.load_state_dict(state)
        for i in steps:
            p.grad = torch.linspace(-1, 1, 4) * (i + 1)
            adam.step()
        return p.detach(), adam.state_dict()

    whole, _ = run(range(6))
    half, state = run(range(3))
    resumed, _ = run(range(3, 6), state, half)
    assert torch.equal(resumed, whole)


def test_fused_adam_in_half_precision_state():
    p = torch.nn.Parameter(torch.ones(4))
    adam = FusedAdam([p], lr=0.1, exp_avg_dtype=torch.bfloat16)
    for i in range(3):
        p.grad = torch.full((4,), float(i + 1))
        adam.step()
    assert adam.state[p]["exp_avg"].dtype is torch.bfloat16
    assert adam.state[p]["exp_avg_sq"].dtype is torch.float32
    m = 0.0
    for i in range(3):
        m = 0.9 * m + 0.1 * (i + 1)
    assert torch.allclose(adam.state[p]["exp_avg"].float(), torch.full((4,), m), rtol=2**-6)


def test_fused_adam_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="master weights inside the optimizer need Transformer"):
        FusedAdam([torch.nn.Parameter(torch.ones(1))], master_weights=True)


def schedule(train_iters, **options):
    """Return the learning rate of each step of a run, and the one after it."""
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.0, "weight_decay": 0.0}])
    found = build_schedule(kernel_config(**options), optimizer, train_iters)
    rates = [optimizer.param_groups[0]["lr"]]
    for _ in range(train_iters):
        found.step(1)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


def warmed(step, warmup):
    return 0.1 * step / warmup


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"lr_decay_style": "constant"}, lambda t: 1.0),
        ({"lr_decay_style": "linear"}, lambda t: 1 - t),
        ({"lr_decay_style": "cosine"}, lambda t: (1 + math.cos(math.pi * t)) / 2),
        ({}, lambda t: (1 + math.cos(math.pi * t)) / 2),
    ],
    ids=["constant", "linear", "cosine", "default"],
)
@pytest.mark.parametrize("floor", [0.0, 0.02])
@pytest.mark.parametrize("warmup", [{}, {"lr_warmup_iters": 4}, {"lr_warmup_fraction": 0.2}])
def test_schedules(options, shape, floor, warmup):
    n = {"lr_warmup_iters": 4, "lr_warmup_fraction": 4}.get(next(iter(warmup), ""), 0)
    rates = schedule(20, lr=0.1, min_lr=floor, **options, **warmup)
    assert len(rates) == 21
    for step, rate in enumerate(rates):
        if step < n:
            want = 0.1 * step / n
        elif options.get("lr_decay_style") == "constant":
            want = 0.1
        else:
            want = floor + (0.1 - floor) * shape((step - n) / (20 - n))
        assert math.isclose(rate, want, abs_tol=1e-9), step


def test_decay_ends_before_the_run():
    rates = schedule(10, lr=0.1, min_lr=0.01, lr_decay_style="linear", lr_decay_iters=4)
    assert [round(r, 6) for r in rates[:5]] == [0.1, 0.0775, 0.055, 0.0325, 0.01]
    assert rates[5:] == [0.01] * 6


def test_a_warm_up_longer_than_the_run_still_decays():
    """Megatron asserts here; a run of a few steps with a usual warm-up must work."""
    rates = schedule(3, lr=0.1, lr_decay_style="linear", lr_warmup_iters=100)
    assert [round(r, 6) for r in rates] == [0.0, 0.05, 0.1, 0.0]
    assert len(schedule(1, lr=0.1, lr_warmup_iters=5)) == 2


def test_min_lr_over_lr_is_lr():
    assert schedule(2, lr=0.1, min_lr=0.5, lr_decay_style="linear") == [0.1, 0.1, 0.1]


def test_weight_decay_is_set_with_the_learning_rate():
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.0, "weight_decay": 0.0, "wd_mult": 1.0}])
    found = build_schedule(kernel_config(weight_decay=0.25), optimizer, 4)
    found.step(1)
    assert optimizer.param_groups[0]["weight_decay"] == 0.25


def test_defaults():
    assert FULL_LR == 1e-5
    assert peak_lr(kernel_config()) == 1e-5
    assert peak_lr(kernel_config(lr=0.5)) == 0.5
    assert uses_distributed_optimizer(kernel_config())
    assert not uses_distributed_optimizer(kernel_config(use_distributed_optimizer=False))
    for name in ("muon", "dist_muon"):
        assert not uses_distributed_optimizer(kernel_config(optimizer=name))


def test_megatron_still_needs_the_patch_of_layer_wise_optimizers():
    """Once this fails, mcore_core/compat/layer_wise.py can go."""
    import inspect

    from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer

    source = inspect.getsource(LayerWiseDistributedOptimizer.__init__)
    assert "if config.bf16:" in source
    assert "FP32Optimizer(" not in source.replace("isinstance", "")
