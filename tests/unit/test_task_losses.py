"""Losses of the tasks, values and gradients, against references in float64 written here.

The references go through the rows one by one, with Python's loops.
"""

import math

import numpy as np
import pytest
import torch
from task_tools import CASES, EXACT, compare, documents, ids, loss_of, mean, recipe

# -- seq_cls ---------------------------------------------------------------------------------------


def texts(rng, make_label):
    found = []
    for _ in range(rng.integers(1, 7)):
        text = ids(rng)
        weights = np.zeros(len(text), np.float32)
        weights[-1] = 1
        label = np.asarray(make_label(), np.float64)
        found.append({"input_ids": text, "weights": weights, "labels": label, "length": len(text)})
    return found


def labelled(problem, n, rng):
    match problem:
        case "regression":
            return texts(rng, lambda: rng.normal(size=n))
        case "single_label_classification":
            return texts(rng, lambda: [rng.integers(0, n)])
        case _:
            return texts(rng, lambda: rng.integers(0, 2, n))


def one_text(problem, scores, label):
    if problem == "regression":
        return sum((s - y) ** 2 for s, y in zip(scores, label, strict=True)) / len(label)
    if problem == "single_label_classification":
        return torch.log(sum(torch.exp(s) for s in scores)) - scores[int(label[0])]
    terms = []
    for s, y in zip(scores, label, strict=True):
        p = 1 / (1 + torch.exp(-s))
        terms.append(-(y * torch.log(p) + (1 - y) * torch.log(1 - p)))
    return sum(terms) / len(terms)


@pytest.mark.parametrize(
    ("problem", "n"),
    [
        ("regression", 1),
        ("regression", 3),
        ("single_label_classification", 2),
        ("single_label_classification", 5),
        ("multi_label_classification", 4),
    ],
)
def test_seq_cls(problem, n):
    made = recipe("seq_cls", num_labels=n, problem_type=problem)
    for seed in range(CASES):
        rng = np.random.default_rng(seed)
        units = labelled(problem, n, rng)
        values = rng.normal(size=(len(units), n)) * 2

        def reference(scores, units=units):
            rows = zip(scores, units, strict=True)
            return mean(one_text(problem, s, unit["labels"]) for s, unit in rows)

        compare(made, units, values, reference)


@pytest.mark.parametrize("problem", ["regression", "single_label_classification"])
def test_seq_cls_is_transformers(problem):
    from transformers import Qwen3Config
    from transformers.loss.loss_utils import ForSequenceClassificationLoss

    n = 1 if problem == "regression" else 3
    made = recipe("seq_cls", num_labels=n, problem_type=problem)
    rng = np.random.default_rng(0)
    units = labelled(problem, n, rng)
    scores = torch.tensor(rng.normal(size=(len(units), n)))
    labels = torch.tensor(np.stack([u["labels"] for u in units])).squeeze(-1)
    labels = labels if n == 1 else labels.long()
    settings = Qwen3Config(num_labels=n, problem_type=problem)
    wanted = ForSequenceClassificationLoss(labels, scores, settings)
    out = loss_of(made, units, scores)
    torch.testing.assert_close(out.total / out.count, wanted, **EXACT)


def test_seq_cls_measures():
    def measure(problem, n, labels, scores):
        made = recipe("seq_cls", num_labels=n, problem_type=problem)
        rng = np.random.default_rng(0)
        label = iter(labels)
        units = [texts(rng, lambda: next(label))[0] for _ in range(0)]
        for wanted in labels:
            unit = texts(np.random.default_rng(1), lambda wanted=wanted: wanted)[0]
            units.append(unit)
        out = loss_of(made, units, torch.tensor(scores, dtype=torch.float64))
        return {k: float(a / b) for k, (a, b) in out.metrics.items()}, made, out.rows

    single, _, _ = measure(
        "single_label_classification", 2, [[0], [1], [1]], [[1, 0], [1, 0], [0, 1]]
    )
    assert single == {"accuracy": pytest.approx(2 / 3)}
    multi, _, _ = measure("multi_label_classification", 2, [[0, 1], [1, 1]], [[-1, 1], [1, -1]])
    assert multi == {"accuracy": 0.5, "label_accuracy": 0.75}
    line, made, rows = measure("regression", 1, [[0.0], [1.0], [2.0]], [[1.0], [9.0], [10.0]])
    assert line == {"mae": pytest.approx((1 + 8 + 8) / 3)}
    found = made.summarize(rows)
    assert found["spearman"] == pytest.approx(1.0)
    assert found["pearson"] == pytest.approx(np.corrcoef([0, 1, 2], [1, 9, 10])[0, 1])


# -- embedding -------------------------------------------------------------------------------------


def unit_vector(x):
    return x / torch.sqrt((x * x).sum())


def groups(units, vectors):
    """Query, positive and negatives of each unit, of length 1."""
    found, at = [], 0
    for unit in units:
        size = len(unit["lengths"])
        found.append([unit_vector(v) for v in vectors[at : at + size]])
        at += size
    return found


def infonce(options):
    def of(units, vectors):
        texts = groups(units, vectors)
        t = options.get("infonce_temperature", 0.1)
        losses = []
        for i, (query, positive, *negatives) in enumerate(texts):
            right = query @ positive
            candidates = []
            if options.get("infonce_use_batch", True):
                for j, (_, other, *more) in enumerate(texts):
                    candidates += [query @ d for d in ([*more] if j == i else [other, *more])]
            else:
                candidates += [query @ d for d in negatives]
            if options.get("infonce_include_qq"):
                candidates += [query @ texts[j][0] for j in range(len(texts)) if j != i]
            if options.get("infonce_include_dd"):
                for j, (_, other, *more) in enumerate(texts):
                    candidates += [positive @ d for d in ([*more] if j == i else [other, *more])]
            if options.get("infonce_mask_fake_negative"):
                bound = right.item() + options.get("infonce_fake_neg_margin", 0.1)
                candidates = [c for c in candidates if c.item() <= bound]
            every = [right, *candidates]
            losses.append(torch.log(sum(torch.exp(s / t) for s in every)) - right / t)
        return mean(losses)

    return of


INFONCE = {
    "in batch": {},
    "temperature": {"infonce_temperature": 0.5},
    "own negatives": {"infonce_use_batch": False},
    "queries too": {"infonce_include_qq": True},
    "documents too": {"infonce_include_dd": True},
    "all of it, without fakes": {
        "infonce_include_qq": True,
        "infonce_include_dd": True,
        "infonce_mask_fake_negative": True,
        "infonce_fake_neg_margin": 0.05,
        "infonce_temperature": 0.3,
    },
}


@pytest.mark.parametrize("name", INFONCE)
def test_infonce(name):
    options = INFONCE[name]
    made = recipe("embedding", **options)
    for seed in range(CASES):
        rng = np.random.default_rng(seed)
        units = [documents(rng) for _ in range(rng.integers(1, 5))]
        values = rng.normal(size=(sum(len(u["lengths"]) for u in units), 6))
        compare(made, units, values, lambda v, u=units: infonce(options)(u, v))


def test_fake_negatives_are_left_out_in_some_cases():
    """The option acts: else the case above would show nothing."""
    rng = np.random.default_rng(0)
    units = [documents(rng) for _ in range(4)]
    values = torch.tensor(rng.normal(size=(sum(len(u["lengths"]) for u in units), 6)))
    plain, masked = (
        loss_of(recipe("embedding", infonce_mask_fake_negative=on), units, values).total
        for on in (False, True)
    )
    assert masked < plain - 0.1


def cosine(pairs, labels):
    return mean((q @ d - y) ** 2 for (q, d), y in zip(pairs, labels, strict=True))


def contrastive(pairs, labels):
    losses = []
    for (q, d), y in zip(pairs, labels, strict=True):
        far = 1 - q @ d
        apart = torch.clamp(0.4 - far, min=0)
        losses.append(0.5 * (y * far * far + (1 - y) * apart * apart))
    return mean(losses)


PAIRS = {"cosine_similarity": cosine, "contrastive": contrastive}


@pytest.mark.parametrize("name", PAIRS)
def test_losses_of_pairs(name):
    margin = {} if name == "cosine_similarity" else {"contrastive_margin": 0.4}
    made = recipe("embedding", loss_type=name, **margin)
    for seed in range(CASES):
        rng = np.random.default_rng(seed)
        labels = [
            float(rng.uniform(-1, 1) if name == "cosine_similarity" else rng.integers(0, 2))
            for _ in range(rng.integers(1, 7))
        ]
        units = [documents(rng, negatives=(0, 1), label=y) for y in labels]
        values = rng.normal(size=(2 * len(units), 5)).astype(np.float64)
        rounded = torch.tensor(labels, dtype=torch.float32).double().tolist()
        compare(
            made,
            units,
            values,
            lambda v, u=units, y=rounded: PAIRS[name](groups(u, v), y),
        )


def test_online_contrastive_is_sentence_transformers():
    from sentence_transformers.sentence_transformer.losses import OnlineContrastiveLoss

    class Given(torch.nn.Module):
        def forward(self, features):
            return {"sentence_embedding": features["x"]}

    made = recipe("embedding", loss_type="online_contrastive", contrastive_margin=0.8)
    theirs_of = OnlineContrastiveLoss(Given(), margin=0.8)
    for seed in range(CASES):
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, 2, rng.integers(1, 9))
        units = [documents(rng, negatives=(0, 1), label=float(y)) for y in labels]
        values = rng.normal(size=(2 * len(units), 4))
        mine, theirs = (torch.tensor(values, requires_grad=True) for _ in range(2))
        wanted = theirs_of([{"x": theirs[0::2]}, {"x": theirs[1::2]}], torch.tensor(labels))
        out = loss_of(made, units, mine)
        torch.testing.assert_close(out.total / out.count, wanted, **EXACT)
        (out.total / out.count).backward()
        wanted.backward()
        torch.testing.assert_close(mine.grad, theirs.grad, **EXACT)


def test_matryoshka_adds_up_sizes():
    weights = [1.0, 0.5, 2.0]
    made = recipe("embedding", mrl_dims=[6, 4, 2], mrl_weights=weights)
    for seed in range(CASES):
        rng = np.random.default_rng(seed)
        units = [documents(rng) for _ in range(rng.integers(1, 5))]
        values = rng.normal(size=(sum(len(u["lengths"]) for u in units), 6))

        def reference(v, units=units):
            sizes = zip((6, 4, 2), weights, strict=True)
            return sum(w * infonce({})(units, v[:, :n]) for n, w in sizes)

        compare(made, units, values, reference)


def test_embedding_measures():
    made = recipe("embedding")
    rng = np.random.default_rng(0)
    units = [documents(rng, negatives=(1, 3)) for _ in range(4)]
    values = torch.tensor(rng.normal(size=(sum(len(u["lengths"]) for u in units), 6)))
    out = loss_of(made, units, values)
    sets = groups(units, values)
    right, others, margins = [], [], []
    for i, (query, positive, *_) in enumerate(sets):
        near = [
            float(query @ d)
            for j, (_, *docs) in enumerate(sets)
            for k, d in enumerate(docs)
            if (i, 0) != (j, k)
        ]
        right.append(float(query @ positive))
        others.append(np.mean(near))
        margins.append(right[-1] - max(near))
    means = {k: float(a / b) for k, (a, b) in out.metrics.items()}
    wanted = {"mean_pos": right, "mean_neg": others, "margin": margins}
    assert means == pytest.approx({k: np.mean(v) for k, v in wanted.items()})
    ranks = [
        1 + sum(float(q @ d) > r + 1e-9 for _, d, *_ in sets)
        for (q, *_), r in zip(sets, right, strict=True)
    ]
    found = made.summarize(out.rows)
    assert found["recall@1"] == pytest.approx(np.mean([rank == 1 for rank in ranks]))
    assert found["mrr"] == pytest.approx(np.mean([1 / rank for rank in ranks]))


def test_embeddings_that_are_all_the_same_find_nothing():
    rows = torch.nn.functional.normalize(torch.ones(50, 8), dim=-1)
    found = recipe("embedding").summarize(torch.cat([rows, rows], 1))
    assert found["recall@1"] == pytest.approx(1 / 50)


# -- all -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["seq_cls", "generative_reranker"])
def test_parts_of_a_batch_add_up(task):
    """Texts and queries that are not compared with each other may be anywhere."""
    rng = np.random.default_rng(3)
    if task == "seq_cls":
        made, n = recipe(task, num_labels=3), 3
        units = [labelled("single_label_classification", 3, rng)[0] for _ in range(6)]
        sizes = [1] * 6
    else:
        made, n = recipe(task), 2
        units = [documents(rng, queries=0, positives=(1, 3)) for _ in range(6)]
        sizes = [len(u["lengths"]) for u in units]
    values = torch.tensor(rng.normal(size=(sum(sizes), n)))
    whole = loss_of(made, units, values)
    parts, at = [], 0
    for a, b in ((0, 1), (1, 4), (4, 6)):
        size = sum(sizes[a:b])
        parts.append(loss_of(made, units[a:b], values[at : at + size]))
        at += size
    assert math.isclose(sum(float(p.total) for p in parts), float(whole.total), rel_tol=1e-12)
    assert sum(float(p.count) for p in parts) == float(whole.count)
