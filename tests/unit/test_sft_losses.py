"""Cross-entropy, dynamic fine-tuning and channels through the head, against plain float64 loops."""

from typing import Any

import numpy as np
import pytest
import torch
from data_tools import make_config, make_template
from mcore_sft.recipe import SFTRecipe

from mcore_core.data.rows import RowError
from mcore_core.errors import UsageError
from mcore_core.model import head
from mcore_core.model.head import VocabRange, local_loss
from mcore_core.protocols import HeadSpec
from mcore_core.train.place import select

REDUCE: Any = None  # these losses need no communication
VOCAB, HIDDEN = 23, 7
NAMES = ("", "code", "math", "poetry")


class Alone:
    """One data-parallel rank, or several with what the others have met."""

    def __init__(self, *others: list[str]) -> None:
        self.others = others

    def gather(self, value: list[str]) -> list[list[str]]:
        return [value, *self.others]


def recipe(**options: Any) -> SFTRecipe:
    return SFTRecipe(make_config(**options), make_template())


def units(seed: int, count: int = 9) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    found = []
    for i in range(count):
        n = int(rng.integers(1, 12))
        weights = (rng.random(n) < 0.7) * rng.choice([0.5, 1.0, 2.0], n)
        found.append(
            {
                "input_ids": rng.integers(0, VOCAB, n).astype(np.int32),
                "weights": (weights * (i != 2)).astype(np.float32),
                "length": n,
                "channel": NAMES[int(rng.integers(0, 3))],  # nobody is a poet
            }
        )
    return found


def computed(one: SFTRecipe, samples: list[dict[str, Any]], hidden: Any, weight: Any) -> Any:
    """The loss as a run computes it, in several chunks of tokens."""
    next(one.prepare(samples, Alone()))  # type: ignore[arg-type]
    batch = one.collate(samples)
    kept = batch.weights_T.nonzero().squeeze(-1)
    batch = select(batch, kept)
    return local_loss(
        hidden[kept],
        weight,
        batch.targets_T,
        lambda out, where: one.loss(out, select(batch, where), REDUCE),  # type: ignore[arg-type]
        vocab=VocabRange(start=0, rows=VOCAB),
        spec=HeadSpec(),
    )


def reference(
    samples: list[dict[str, Any]], hidden: Any, weight: Any, *, dft: bool, per_token: bool
) -> tuple[Any, float, dict[str, Any]]:
    """Token by token, sample by sample."""
    total = torch.zeros((), dtype=torch.float64)
    count, start = 0.0, 0
    channels: dict[str, Any] = {}
    for unit in samples:
        share = float(unit["weights"][1:].sum())
        for t in range(1, unit["length"]):
            logits = hidden[start + t - 1] @ weight.t()
            logp = logits[int(unit["input_ids"][t])] - torch.logsumexp(logits, 0)
            scale = float(unit["weights"][t])
            each, counted = -scale * logp, scale
            if dft:
                each = each * float(logp.detach().exp())
            if not per_token:
                each, counted = (each / share, scale / share) if scale else (each, 0.0)
            total, count = total + each, count + counted
            if unit["channel"]:
                a, b = channels.get(unit["channel"], (0.0, 0.0))
                channels[unit["channel"]] = (a + float(each.detach()), b + counted)
        start += unit["length"]
    return total, count, channels


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("dft", [True, False])
def test_value_and_gradient(dft, per_token, monkeypatch):
    monkeypatch.setattr(head, "CHUNK_BYTES", 16 * VOCAB * 4)
    samples = units(0, count=12)
    # a sample's first token is not predicted: its weight is 0 in what the template gives
    for unit in samples:
        unit["weights"][:1] = 0
    length = sum(u["length"] for u in samples)
    generator = torch.Generator().manual_seed(1)
    hidden64 = torch.randn(length, HIDDEN, generator=generator, dtype=torch.float64)
    weight64 = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64)
    inputs = [x.float().requires_grad_() for x in (hidden64, weight64)]
    wide = [x.double().detach().requires_grad_() for x in inputs]
    one = recipe(enable_dft_loss=dft, enable_channel_loss=True, calculate_per_token_loss=per_token)
    out = computed(one, samples, *inputs)
    out.total.backward()
    total, count, channels = reference(samples, *wide, dft=dft, per_token=per_token)
    total.backward()
    assert float(out.total.detach()) == pytest.approx(float(total.detach()), rel=1e-6)
    assert float(out.count) == pytest.approx(count, rel=1e-6)
    for mine, theirs in zip(inputs, wide, strict=True):
        largest = float(theirs.grad.abs().max())
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=0, atol=2e-6 * largest)
    assert set(channels) == {"code", "math"}
    found = {n.removeprefix("loss/"): (float(a), float(b)) for n, (a, b) in out.metrics.items()}
    for name, pair in channels.items():
        assert found[name] == pytest.approx(pair, rel=1e-6)


def test_dynamic_fine_tuning_has_the_gradient_of_minus_the_probability():
    samples = units(3)
    for unit in samples:
        unit["weights"][:1] = 0
    length = sum(u["length"] for u in samples)
    hidden = torch.randn(length, HIDDEN, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(VOCAB, HIDDEN, requires_grad=True)
    computed(recipe(enable_dft_loss=True), samples, hidden, weight).total.backward()
    batch = recipe().collate(samples)
    wide = weight.detach().double().requires_grad_()
    p_T = (hidden.double() @ wide.t()).softmax(-1).gather(1, batch.targets_T[:, None])[:, 0]
    (-(batch.weights_T * p_T).sum()).backward()
    torch.testing.assert_close(weight.grad.double(), wide.grad, rtol=1e-4, atol=1e-5)


def test_a_perplexity_is_that_of_the_cross_entropy_alone():
    assert recipe().loss_is_nll
    assert not recipe(enable_dft_loss=True).loss_is_nll


def test_ranks_report_the_channels_that_any_of_them_has_met():
    one = recipe(enable_channel_loss=True)
    mine = [u | {"channel": "math"} for u in units(1, 2)]
    next(one.prepare(mine, Alone(["poetry"], [])))  # type: ignore[arg-type]
    assert one.collate(mine).channels == ("math", "poetry")
    next(one.prepare(mine, Alone(["code"])))  # type: ignore[arg-type]
    batch = one.collate(mine)
    assert batch.channels == ("code", "math", "poetry")
    assert batch.channel_T is not None
    assert set(batch.channel_T.tolist()) == {2}


def test_rows_say_their_channel():
    one = recipe(enable_channel_loss=True)
    row = {"text": "abc"}
    assert [
        one.encode(row | more)["channel"] for more in ({"channel": " a "}, {"channel": 3}, {})
    ] == [
        "a",
        "3",
        "",
    ]
    with pytest.raises(RowError, match="'channel' must be a name, found list"):
        one.encode(row | {"channel": ["a"]})
    assert "channel" in one.fields
    assert "channel" not in recipe().fields
    assert "channel" not in recipe().encode(row | {"channel": "a"})


def test_data_without_channels_or_with_too_many():
    class Table:
        def __init__(self, *names: str) -> None:
            self.names = names

        def distinct(self, _: str) -> set[str]:
            return set(self.names)

    one = recipe(enable_channel_loss=True)
    one.check_data([Table("", "a"), Table("")])  # type: ignore[list-item]
    with pytest.raises(UsageError, match=r"MC431.*no row says which channel"):
        one.check_data([Table(""), Table("")])  # type: ignore[list-item]
    many = [str(i) for i in range(300)]
    with pytest.raises(UsageError, match="300 values or more"):
        one.check_data([Table(*many)])  # type: ignore[list-item]
    with pytest.raises(UsageError, match="'0', '1', '10', '100'"):
        next(one.prepare(units(1), Alone(many)))  # type: ignore[arg-type]
    recipe().check_data([Table()])  # type: ignore[list-item]
