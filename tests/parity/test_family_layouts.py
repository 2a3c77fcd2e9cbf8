"""In every layout a family's model has transformers' loss and gradients, and is saved as it was."""

from functools import cache

import pytest
import torch
from family_cases import CASES, family_of, layouts_of, tensors_of, write
from family_runs import LENGTHS, gradients_of, tokens_and_weights

from mcore_core import compat

compat.apply()  # before anything imports megatron

from mcore_hfbridge.bridge import HFBridge  # noqa: E402
from mcore_sft.config import SFTConfig  # noqa: E402
from mcore_sft.recipe import SFTRecipe  # noqa: E402

from mcore_core.model.names import unwrap  # noqa: E402
from mcore_core.model.resolve import read_hf_config  # noqa: E402
from mcore_core.testing.cases import Case, Session  # noqa: E402
from mcore_core.testing.ranks import fork_ranks  # noqa: E402

LIMIT = 1e-4
"""Of each gradient's norm."""


def units():
    """Two micro-batches of one sequence each: data-parallel ranks take one."""
    tokens_T, _ = tokens_and_weights()
    return [
        [{"input_ids": part.numpy(), "weights": torch.ones(len(part)).numpy(), "length": len(part)}]
        for part in tokens_T.split(LENGTHS)
    ]


@cache
def expected(name, folder):
    """Return transformers' mean cross-entropy and its gradients, HF-named."""
    case = CASES[name]
    model = write(folder / "model", case)
    tokens_T, _ = tokens_and_weights()
    total = torch.zeros(())
    for part in tokens_T.split(LENGTHS):
        logits = model(part.unsqueeze(0)).logits[0]
        total = total + torch.nn.functional.cross_entropy(logits[:-1], part[1:], reduction="sum")
    loss = total / (sum(LENGTHS) - len(LENGTHS))
    loss.backward()
    return loss.item(), gradients_of(model, case, folder / "gradients")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return cache(lambda name: tmp_path_factory.mktemp(name))


def _run(folder, out, family, layout):
    """Return the loss and the gradients, and save the model as it was loaded."""
    architecture = family.architecture(read_hf_config(folder))
    case = Case(
        architecture=architecture,
        recipe=lambda config: SFTRecipe(config, None),
        steps=[units()],
        options={"use_distributed_optimizer": False, "optimizer": "sgd", "lr": 1e-3},
        groups=(SFTConfig,),
    )
    session = Session(case, layout)
    chunks = [unwrap(chunk) for chunk in session.chunks]
    for chunk in chunks:
        for p in chunk.parameters():
            p.data.fill_(float("nan"))
    bridge = HFBridge(family, architecture)
    bridge.load(chunks, folder)
    bridge.save(chunks, out, max_shard_size=10**6, source=folder)
    kept = {}
    config = session.stepper.config
    finalize = config.finalize_model_grads_func

    def wrapped(model, num_tokens=None, **kwargs):
        finalize(model, num_tokens, **{**kwargs, "force_all_reduce": True})
        for chunk in chunks:
            kept.update({p: p.main_grad.clone() for p in chunk.parameters()})

    config.finalize_model_grads_func = wrapped
    (result,) = session.train(1)
    with torch.no_grad():
        for chunk in chunks:
            for p in chunk.parameters():
                p.copy_(kept[p])
            for name, buffer in chunk.named_buffers():
                if name.endswith("expert_bias"):
                    buffer.zero_()
    return result.loss, {n: t.clone() for n, t in bridge.export(chunks)}


def check(name, layout_name, folder):
    case = CASES[name]
    loss, gradients = expected(name, folder)
    layout = layouts_of(case)[layout_name]
    model, out = folder / "model", folder / layout_name
    ranks = fork_ranks(lambda _: _run(model, out, family_of(case), layout), layout.world)
    for found, given in ranks:
        assert abs(found - loss) < 1e-5 * loss
        assert given.keys() == gradients.keys()
        for key, gradient in gradients.items():
            error = (given[key] - gradient).norm()
            # a bias of keys changes nothing where there is no position: its gradient is noise
            assert error <= max(LIMIT * gradient.norm(), 2e-6), key
    saved, before = tensors_of(out), tensors_of(model)
    assert saved.keys() == before.keys()
    assert all(torch.equal(saved[k], before[k]) for k in before)


@pytest.mark.parity
@pytest.mark.parametrize("name", CASES)
def test_one_layout(name, folders):
    several = list(layouts_of(CASES[name]))
    check(name, several[list(CASES).index(name) % 2], folders(name))


@pytest.mark.parity
@pytest.mark.parametrize(
    ("name", "layout"), [(n, layout) for n, case in CASES.items() for layout in layouts_of(case)]
)
def test_grid(name, layout, folders):
    check(name, layout, folders(name))
