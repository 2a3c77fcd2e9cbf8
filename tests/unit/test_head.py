"""The head against log_softmax over whole float64 logits, in value and gradient."""

import pytest

from mcore_core import compat

compat.apply()  # before anything imports megatron

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from mcore_core.model import head, head_kernels  # noqa: E402
from mcore_core.model.head import VocabRange, local_loss, log_probabilities  # noqa: E402
from mcore_core.protocols import HeadOut, HeadSpec, LossOutput  # noqa: E402
from mcore_core.testing.ranks import fork_ranks  # noqa: E402


def draw(seed, tokens=None, vocab=None):
    g = torch.Generator().manual_seed(seed)

    def pick(low, high):
        return int(torch.randint(low, high, (1,), generator=g))

    tokens = pick(1, 60) if tokens is None else tokens
    vocab, size = vocab or pick(2, 90), pick(1, 12)
    return {
        "hidden": torch.randn(tokens, size, generator=g),
        "weight": torch.randn(vocab, size, generator=g) * float(pick(1, 6)),
        "targets": torch.randint(0, vocab, (tokens,), generator=g),
        "grad": torch.randn(tokens, generator=g),
        "temperature": [0.3, 0.7, 1.0, 1.7][pick(0, 4)],
        "entropy": bool(pick(0, 2)),
        "summary": bool(pick(0, 2)),
        "vocab": vocab,
    }


def reference(case):
    hidden = case["hidden"].double().requires_grad_()
    weight = case["weight"].double().requires_grad_()
    logs = torch.log_softmax(hidden @ weight.t() / case["temperature"], -1)
    logps = logs.gather(-1, case["targets"][:, None]).squeeze(-1)
    (logps * case["grad"]).sum().backward()
    entropy = -(logs.exp() * logs).sum(-1).detach()
    return logps.detach(), entropy, hidden.grad, weight.grad


def weighted(case):
    def loss(out, where):
        grad = case["grad"][where]
        ones = torch.ones(len(grad))
        return LossOutput(
            (out.logps_T * grad).sum(), ones.sum(), {"square": ((out.logps_T**2).sum(), ones.sum())}
        )

    return loss


def close(a, b, what, relative=2e-5):
    scale = float(b.abs().max()) if b.numel() else 0.0
    worst = float((a.double() - b).abs().max()) if b.numel() else 0.0
    assert worst <= relative * max(scale, 1.0), f"{what}: {worst} of {scale}"


def compute(case, how, vocab, weight):
    """Return log-probabilities (None for local_loss), entropy and both gradients."""
    hidden = case["hidden"].clone().requires_grad_()
    weight = weight.clone().requires_grad_()
    spec = HeadSpec(
        entropy=case["entropy"], temperature=case["temperature"], summary=case["summary"]
    )
    if how == "all":
        out = log_probabilities(hidden, weight, case["targets"], vocab=vocab, spec=spec)
        assert out.logps_T.dtype is torch.float32
        (out.logps_T * case["grad"]).sum().backward()
        return out, None, hidden.grad, weight.grad
    loss = local_loss(hidden, weight, case["targets"], weighted(case), vocab=vocab, spec=spec)
    loss.total.backward()
    return None, loss, hidden.grad, weight.grad


def check_summary(case, out):
    """Of the real vocabulary, before the temperature."""
    if not case["summary"]:
        assert out.mean_logit_T is out.top_T is None
        return
    logits = case["hidden"].double() @ case["weight"].double().t()
    close(out.mean_logit_T, logits.mean(-1), "mean of the logits", 1e-4)
    assert out.top_T.tolist() == (logits.argmax(-1) == case["targets"]).float().tolist()
    assert not out.mean_logit_T.requires_grad
    assert not out.top_T.requires_grad


def check(case, how, vocab, weight, rows=slice(None)):
    logps, entropy, hidden_grad, weight_grad = reference(case)
    out, loss, d_hidden, d_weight = compute(case, how, vocab, weight)
    if how == "all":
        close(out.logps_T, logps, "log-probabilities")
        if case["entropy"]:
            close(out.entropy_T, entropy, "entropy")
            assert not out.entropy_T.requires_grad
        else:
            assert out.entropy_T is None
        check_summary(case, out)
    else:
        close(loss.total, (logps * case["grad"]).sum(), "total")
        assert float(loss.count) == len(logps)
        close(loss.metrics["square"][0], (logps**2).sum(), "metric")
        assert float(loss.metrics["square"][1]) == len(logps)
    expected = weight_grad[rows]
    close(d_weight[: len(expected)], expected, "gradient of the weight")
    assert not d_weight[len(expected) :].any()  # padding rows
    return d_hidden, hidden_grad


@pytest.mark.parametrize("few", [head_kernels.CACHED, 100])
@pytest.mark.parametrize("chunk_bytes", [head.CHUNK_BYTES, 1])
@pytest.mark.parametrize("how", ["all", "local"])
def test_random_cases(monkeypatch, how, chunk_bytes, few):
    """150 shapes, vocabularies, temperatures; in one chunk and in chunks of 16 tokens.

    Either worked on at once, or one or some tokens at a time.
    """
    monkeypatch.setattr(head, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(head_kernels, "CACHED", few)
    for seed in range(150):
        case = draw(seed)
        vocab = VocabRange(start=0, rows=case["vocab"])
        d_hidden, expected = check(case, how, vocab, case["weight"])
        close(d_hidden, expected, "gradient of the hidden states")


@pytest.mark.parametrize("how", ["all", "local"])
def test_vocabulary_padding_takes_no_part(how):
    """Padding rows would dominate every sum: their logits are huge."""
    for seed in range(20):
        case = draw(seed)
        padded = torch.cat((case["weight"], 1e3 * torch.ones(3, case["weight"].shape[1])))
        vocab = VocabRange(start=0, rows=case["vocab"])
        d_hidden, expected = check(case, how, vocab, padded)
        close(d_hidden, expected, "gradient of the hidden states")


def test_chunks_cover_every_token_once(monkeypatch):
    monkeypatch.setattr(head, "CHUNK_BYTES", 4 * 10 * 20)
    assert list(head.chunks_of(45, 10, 4)) == [slice(0, 20), slice(20, 40), slice(40, 45)]
    assert list(head.chunks_of(40, 10, 4)) == [slice(0, 20), slice(20, 40)]
    assert list(head.chunks_of(0, 10, 4)) == []
    assert list(head.chunks_of(17, 10**9, 4)) == [slice(0, 16), slice(16, 17)]


@pytest.mark.parametrize("tokens", [16, 17, 32, 33])
def test_chunk_boundaries(monkeypatch, tokens):
    monkeypatch.setattr(head, "CHUNK_BYTES", 1)
    case = draw(5, tokens=tokens)
    vocab = VocabRange(start=0, rows=case["vocab"])
    for how in ("all", "local"):
        d_hidden, expected = check(case, how, vocab, case["weight"])
        close(d_hidden, expected, "gradient of the hidden states")


def test_no_trained_token():
    """The loss is still asked once, for what it counts; both gradients are zero, not missing."""
    hidden = torch.randn(0, 4, requires_grad=True)
    weight = torch.randn(7, 4, requires_grad=True)
    asked = []

    def loss(out, where):
        asked.append((len(out.logps_T), where))
        return LossOutput(
            out.logps_T.sum(), torch.tensor(3.0), {"m": (out.logps_T.sum(), torch.tensor(2.0))}
        )

    out = local_loss(
        hidden,
        weight,
        torch.zeros(0, dtype=torch.long),
        loss,
        vocab=VocabRange(start=0, rows=7),
        spec=HeadSpec(),
    )
    out.total.backward()
    assert asked == [(0, slice(0, 0))]
    assert (float(out.total), float(out.count)) == (0.0, 3.0)
    assert [float(x) for x in out.metrics["m"]] == [0.0, 2.0]
    assert hidden.grad.shape == (0, 4)
    assert torch.equal(weight.grad, torch.zeros(7, 4))


def test_no_gradient_is_made_in_evaluation():
    case = draw(3)
    spec, vocab = HeadSpec(), VocabRange(start=0, rows=case["vocab"])
    with torch.no_grad():
        out = local_loss(
            case["hidden"].requires_grad_(),
            case["weight"],
            case["targets"],
            weighted({**case, "temperature": 1.0}),
            vocab=vocab,
            spec=spec,
        )
    logps = reference({**case, "temperature": 1.0})[0]
    close(out.total, (logps * case["grad"]).sum(), "total")
    assert not out.total.requires_grad


@pytest.mark.parametrize("chunk_bytes", [head.CHUNK_BYTES, 1])
def test_logits_of_one_chunk_are_computed_once(monkeypatch, chunk_bytes):
    """A second backward pass makes them again: the first one has overwritten them."""
    monkeypatch.setattr(head, "CHUNK_BYTES", chunk_bytes)
    made = []
    monkeypatch.setattr(head, "_Chunk", lambda *a, of=head._Chunk: made.append(len(a[0])) or of(*a))
    case = draw(4, tokens=20)
    hidden = case["hidden"].clone().requires_grad_()
    out = log_probabilities(
        hidden,
        case["weight"],
        case["targets"],
        vocab=VocabRange(start=0, rows=case["vocab"]),
        spec=HeadSpec(temperature=case["temperature"]),
    )
    whole = chunk_bytes > 1
    counts = [(1, 1), (1, 2)] if whole else [(2, 4), (4, 6)]
    for before, after in counts:
        assert len(made) == before
        hidden.grad = None
        (out.logps_T * case["grad"]).sum().backward(retain_graph=True)
        close(hidden.grad, reference(case)[2], "gradient of the hidden states")
        assert len(made) == after


def test_a_frozen_weight_gets_no_gradient():
    case = draw(4)
    hidden = case["hidden"].clone().requires_grad_()
    vocab = VocabRange(start=0, rows=case["vocab"])
    spec = HeadSpec(temperature=case["temperature"])
    expected = reference(case)[2]
    for how in (weighted(case), None):
        hidden.grad = None
        if how is None:
            out = log_probabilities(hidden, case["weight"], case["targets"], vocab=vocab, spec=spec)
            (out.logps_T * case["grad"]).sum().backward()
        else:
            local_loss(
                hidden, case["weight"], case["targets"], how, vocab=vocab, spec=spec
            ).total.backward()
        close(hidden.grad, expected, "gradient of the hidden states")


@pytest.mark.parametrize("world", [2, 4])
def test_vocab_parallel(world):
    """Each rank holds a part of the rows; gradients of the hidden states add up over ranks.

    Five rows over four ranks leave the last one nothing but padding.
    """

    def one_rank(rank):
        head.CHUNK_BYTES = 1  # chunks of 16 tokens; this is a fork
        done = 0
        for seed in range(30):
            case = draw(seed, vocab=[5, 37, 50, 61][seed % 4])
            each = -(-case["vocab"] // world)
            start = rank * each
            rows = max(0, min(each, case["vocab"] - start))
            weight = torch.full((each, case["weight"].shape[1]), 50.0)  # padding is not small
            weight[:rows] = case["weight"][start : start + rows]
            vocab = VocabRange(start=start, rows=rows, group=dist.group.WORLD)
            for how in ("all", "local"):
                d_hidden, expected = check(case, how, vocab, weight, slice(start, start + rows))
                dist.all_reduce(d_hidden)
                close(d_hidden, expected, "gradient of the hidden states")
                done += 1
        return done

    assert fork_ranks(one_rank, world) == [60] * world


def test_bfloat16():
    """Within the rounding of bf16 logits: 2^-8 of their size."""
    for seed in range(10):
        case = draw(seed)
        case["temperature"] = 1.0
        case = {k: v.bfloat16() if k in ("hidden", "weight") else v for k, v in case.items()}
        logps, _, hidden_grad, weight_grad = reference(case)
        vocab = VocabRange(start=0, rows=case["vocab"])
        size = float((case["hidden"].double() @ case["weight"].double().t()).abs().max())
        out, _, d_hidden, d_weight = compute(case, "all", vocab, case["weight"])
        close(out.logps_T, logps, "log-probabilities", 2**-8 * max(size, 1.0) / 1.0)
        assert d_hidden.dtype is d_weight.dtype is torch.bfloat16
        close(d_hidden, hidden_grad, "hidden", 2**-6 * max(size, 1.0))
        close(d_weight, weight_grad, "weight", 2**-6 * max(size, 1.0))
        _, loss, d_hidden, d_weight = compute(case, "local", vocab, case["weight"])
        assert loss.total.dtype is torch.float64
        close(d_hidden, hidden_grad, "hidden", 2**-6 * max(size, 1.0))
        close(d_weight, weight_grad, "weight", 2**-6 * max(size, 1.0))


def test_large_logits_do_not_overflow():
    hidden = torch.tensor([[1e4], [-1e4]])
    weight = torch.tensor([[1.0], [-1.0], [0.5]])
    out = log_probabilities(
        hidden,
        weight,
        torch.tensor([0, 0]),
        vocab=VocabRange(start=0, rows=3),
        spec=HeadSpec(entropy=True),
    )
    assert out.logps_T.tolist() == [0.0, -2e4]
    assert out.entropy_T.tolist() == [0.0, 0.0]


def test_head_out_names():
    """Recipes and plugins rely on these."""
    names = ["logps_T", "entropy_T", "divergence_T", "mean_logit_T", "top_T", "values_TN"]
    assert list(HeadOut.__dataclass_fields__) == names
