"""Tasks from end to end: they learn, alone and as ranks, open elsewhere, and refuse bad rows."""

import json
import random

import pytest
import torch
from commands import metrics

SMALL = [
    "--num_workers", "0", "--micro_batch_size", "8", "--global_batch_size", "16", "--lr", "3e-3",
    "--log_interval", "1", "--max_length", "96",
]  # fmt: skip
NOISE = "abcdefghij"
TOPICS = "ABCDEFGHIJKLMNOPQRSTUVWX"
SHORT = (
    "{% for m in messages if m['role'] == 'user' %}"
    "{{ (m['content'] + '<Query>: ').split('<Query>: ')[1] | replace('\n<Document>: ', ' ') }}"
    "\n{% endfor %}"
)
"""Of a reranker's prompt: the query and the document."""


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def about(rng, topic):
    """Letters that say nothing, around one that does."""
    text = [rng.choice(NOISE) for _ in range(rng.randint(2, 6))]
    text.insert(rng.randrange(len(text) + 1), topic)
    return "".join(text)


def classes(rng, i):
    return {"text": about(rng, TOPICS[i % 3]), "label": i % 3}


def amounts(rng, i):
    text = [rng.choice(NOISE) for _ in range(6)] + ["X"] * (i % 5)
    rng.shuffle(text)
    return {"messages": [{"role": "user", "content": "".join(text)}], "label": (i % 5) / 4}


def pairs(rng, i):
    topic = TOPICS[i % len(TOPICS)]
    other = rng.choice([t for t in TOPICS if t != topic])
    texts = {"query": topic, "positive": topic, "negative": other}
    return {name: about(rng, t) for name, t in texts.items()}


def rankings(rng, i):
    topic = TOPICS[i % 2]
    return {
        "query": topic,
        "positive": about(rng, topic),
        "negative": [about(rng, TOPICS[1 - i % 2])],
    }


TASKS = {
    "seq_cls": (classes, 24, ["--task_type", "seq_cls", "--num_labels", "3"]),
    "regression": (amounts, 40, ["--task_type", "seq_cls", "--num_labels", "1"]),
    "embedding": (pairs, 50, ["--task_type", "embedding"]),
    "generative_reranker": (
        rankings,
        50,
        [
            "--task_type", "generative_reranker",
            "--reranker_positive_token", "y", "--reranker_negative_token", "n",
        ],
    ),
}  # fmt: skip
LEARNED = {
    "seq_cls": ("eval/accuracy", 0.95),
    "regression": ("eval/spearman", 0.85),
    "embedding": ("eval/recall@1", 0.9),
    "generative_reranker": ("eval/recall@1", 0.9),
}
HELD_OUT = {**dict.fromkeys(TASKS, 48), "embedding": 16}
"""Rows to evaluate with; of pairs one a topic, so that a query has one answer."""
RANKS = {
    "seq_cls": ["--tensor_model_parallel_size", "2"],
    "regression": ["--context_parallel_size", "2"],
    "embedding": ["--micro_batch_size", "4"],  # on each of two: 8 are compared with each other
    "generative_reranker": ["--pipeline_model_parallel_size", "2"],
}


@pytest.fixture(scope="module")
def start(mcore, model, tmp_path_factory):
    """Train a task on generated rows and evaluate; return the run folder and the last numbers."""

    def run(name, *options, ranks=1):
        make, steps, argv = TASKS[name]
        folder = tmp_path_factory.mktemp(name)
        rng = random.Random(0)
        train = write(folder / "train.jsonl", [make(rng, i) for i in range(16 * 24)])
        val = write(folder / "val.jsonl", [make(rng, i) for i in range(HELD_OUT[name])])
        if name == "generative_reranker":
            (folder / "short.jinja").write_text(SHORT)
            argv = [*argv, "--chat_template", folder / "short.jinja"]
        small = SMALL if "--micro_batch_size" not in options else [*SMALL[:2], *SMALL[4:]]
        argv = [
            "run", "--plugin", "sft", "--model", model, "--dataset", train, "--val_dataset", val,
            "--train_iters", steps, "--eval_interval", steps, "--save", folder / "run",
            *small, *argv, *options,
        ]  # fmt: skip
        ran = mcore(*argv) if ranks == 1 else mcore.ranks(ranks, *argv)
        assert ran.code == 0, ran.err
        last = [line for line in metrics(ran.folder()) if "eval/loss" in line][-1]
        return ran.folder() / f"checkpoint-{steps}", last, val

    return run


@pytest.fixture(scope="module")
def trained(start):
    """The run of each task on one rank."""
    done = {}

    def of(name):
        if name not in done:
            done[name] = start(name)
        return done[name]

    return of


def rows_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def check_learned(name, last):
    metric, least = LEARNED[name]
    assert last[metric] >= least, last


def test_a_classifier_learns_and_opens_in_transformers(trained):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder, last, val = trained("seq_cls")
    check_learned("seq_cls", last)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    assert model.config.num_labels == 3
    assert model.config.problem_type == "single_label_classification"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = rows_of(val)
    batch = tokenizer([row["text"] for row in rows], return_tensors="pt", padding=True)
    with torch.no_grad():
        out = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            labels=torch.tensor([row["label"] for row in rows]),
        )
    right = [row["label"] for row in rows]
    assert last["eval/loss"] == pytest.approx(out.loss.item(), rel=1e-4)
    accuracy = (out.logits.argmax(-1) == torch.tensor(right)).float().mean().item()
    assert last["eval/accuracy"] == pytest.approx(accuracy)


def test_numbers_are_learned_from_conversations(trained):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder, last, val = trained("regression")
    check_learned("regression", last)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    squares = []
    for row in rows_of(val):
        ids = tokenizer.apply_chat_template(
            row["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        with torch.no_grad():
            squares.append((float(model(ids).logits) - row["label"]) ** 2)
    assert last["eval/loss"] == pytest.approx(sum(squares) / len(squares), rel=1e-4)


def encode(folder, texts):
    """Embeddings by plain transformers, as the files say: the last token, of length 1."""
    from transformers import AutoModel, AutoTokenizer

    modules = json.loads((folder / "modules.json").read_text())
    assert [m["type"].rpartition(".")[2] for m in modules] == [
        "Transformer",
        "Pooling",
        "Normalize",
    ]
    assert json.loads((folder / "1_Pooling/config.json").read_text())["pooling_mode_lasttoken"]
    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for text in texts:
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state
        found.append(torch.nn.functional.normalize(hidden[0, -1], dim=-1))
    return torch.stack(found)


def recall(queries, documents):
    near = queries @ documents.t()
    right = near.diagonal().unsqueeze(1)
    return (near > right + 1e-5).sum(1).eq(0).float().mean().item()


def test_embeddings_learn_and_open_in_transformers(trained):
    folder, last, val = trained("embedding")
    check_learned("embedding", last)
    rows = rows_of(val)
    queries, documents = (encode(folder, [r[k] for r in rows]) for k in ("query", "positive"))
    assert last["eval/mean_pos"] == pytest.approx(
        (queries * documents).sum(1).mean().item(), rel=1e-4
    )


@pytest.mark.slow
def test_embeddings_open_in_sentence_transformers(trained):
    from sentence_transformers import SentenceTransformer

    folder, last, val = trained("embedding")
    model = SentenceTransformer(str(folder), device="cpu")
    assert model.max_seq_length == 96
    rows = rows_of(val)
    texts = [row["query"] for row in rows] + [row["positive"] for row in rows]
    vectors = model.encode(texts, convert_to_tensor=True, batch_size=7).float()
    torch.testing.assert_close(vectors, encode(folder, texts), rtol=1e-4, atol=1e-5)
    queries, documents = vectors.chunk(2)
    assert last["eval/mean_pos"] == pytest.approx(
        (queries * documents).sum(1).mean().item(), rel=1e-4
    )


def test_a_reranker_learns_and_opens_in_transformers(trained):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, last, val = trained("generative_reranker")
    check_learned("generative_reranker", last)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    yes, no = tokenizer.convert_tokens_to_ids(["y", "n"])
    first = []
    for row in rows_of(val):
        odds = []
        for document in (row["positive"], *row["negative"]):
            ids = tokenizer(f"{row['query']} {document}\n", return_tensors="pt")["input_ids"]
            with torch.no_grad():
                logits = model(ids).logits[0, -1]
            odds.append(float(logits[yes] - logits[no]))
        first.append(odds[0] > max(odds[1:]))
    assert last["eval/recall@1"] == pytest.approx(sum(first) / len(first))


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_two_ranks_learn_the_same(start, trained, name):
    _, alone, _ = trained(name)
    _, both, _ = start(name, *RANKS[name], ranks=2)
    check_learned(name, both)
    assert set(alone) == set(both)
    for metric, value in alone.items():
        if metric.startswith("eval/"):
            assert both[metric] == pytest.approx(value, rel=2e-2, abs=2e-3), metric


@pytest.mark.slow
@pytest.mark.parametrize("name", ["seq_cls", "embedding"])
def test_adapters_train(start, name):
    """The head of a classifier trains in full; the merged model opens as one that trained so.

    What adapters of a frozen random model can learn of embeddings is little.
    """
    from transformers import AutoModelForSequenceClassification

    folder, last, val = start(name, "--tuner_type", "lora", "--lora_rank", "16", "--lr", "1e-2")
    merged = folder.with_name(folder.name + "-merged")
    if name == "seq_cls":
        assert last["eval/accuracy"] > 0.6
        saved = json.loads((folder / "adapter_config.json").read_text())
        assert (saved["task_type"], saved["modules_to_save"]) == ("SEQ_CLS", ["score"])
        AutoModelForSequenceClassification.from_pretrained(merged)
    else:
        assert last["eval/loss"] < metrics(folder.parent)[0]["loss"] - 0.5
        rows = rows_of(val)
        queries, documents = (encode(merged, [r[k] for r in rows]) for k in ("query", "positive"))
        mean = (queries * documents).sum(1).mean().item()
        assert last["eval/mean_pos"] == pytest.approx(mean, rel=1e-4)


@pytest.mark.slow
def test_packed_rows_learn(start):
    _, last, _ = start(
        "seq_cls", "--packing", "--packing_length", "64", "--micro_batch_size", "1",
        "--global_batch_size", "2",
    )  # fmt: skip
    assert last["eval/accuracy"] > 0.6


BAD = {
    "no label": (
        ["--task_type", "seq_cls", "--num_labels", "2"],
        [{"text": "a"}],
        "error[MC403]: {file}: no usable columns\n"
        "  found: text\n"
        "  usable: text, label | messages, label | query, label | query, response, label\n",
    ),
    "a label beyond the last": (
        ["--task_type", "seq_cls", "--num_labels", "2"],
        [{"text": "a", "label": 0}, {"text": "b", "label": 2}],
        "error[MC382]: the label 2 of a row does not fit: --num_labels 2 has classes 0 to 1\n"
        "  fix: correct --num_labels, or the data\n",
    ),
    "numbers of another length": (
        ["--task_type", "seq_cls", "--num_labels", "2", "--problem_type", "regression"],
        [{"text": "a", "label": [0.5]}],
        "error[MC382]: the label [0.5] of a row does not fit: --num_labels 2 needs 2 numbers\n",
    ),
    "no number of labels": (
        ["--task_type", "seq_cls"],
        [{"text": "a", "label": 0}],
        "error[MC380]: --task_type seq_cls needs to know how many labels there are\n",
    ),
    "no negatives": (
        ["--task_type", "embedding", "--infonce_use_batch", "false"],
        [{"query": "a", "positive": "b"}],
        "error[MC384]: a row has no negatives, and --infonce_use_batch false needs some\n",
    ),
    "a query alone": (
        ["--task_type", "embedding", "--micro_batch_size", "1", "--global_batch_size", "1"],
        [{"query": "a", "positive": "b"}],
        "error[MC384]: a query is compared with the documents of its micro-batch, and these "
        "micro-batches have one query without negatives\n",
    ),
    "more numbers than there are": (
        ["--task_type", "embedding", "--mrl_dims", "48", "96", "--global_batch_size", "2",
         "--micro_batch_size", "2"],
        [{"query": "a", "positive": "b"}] * 2,
        "error[MC385]: --mrl_dims 96: the embeddings of this model have 48 numbers\n",
    ),
    "an answer of several tokens": (
        ["--task_type", "generative_reranker"],
        [{"query": "a", "positive": "b"}],
        "error[MC386]: --reranker_positive_token 'yes' is not one token of this tokenizer\n",
    ),
    "an unknown task": (
        ["--task_type", "seq_clss"],
        [],
        "error[MC202]: no task named 'seq_clss' (from --task_type)\n",
    ),
    "an unknown loss": (
        ["--task_type", "embedding", "--loss_type", "infonse"],
        [],
        "error[MC202]: no loss named 'infonse' (from --loss_type)\n",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(mcore, model, tmp_path, name):
    options, rows, text = BAD[name]
    file = write(tmp_path / "rows.jsonl", rows)
    argv = ["run", "--plugin", "sft", "--model", model, "--dataset", file, "--num_workers", 0]
    ran = mcore(*argv, "--save", tmp_path / "out", *options)
    assert ran.code == 2, ran.err
    assert text.format(file=file) in ran.err
    assert "Traceback" not in ran.err


def test_a_loss_of_a_file(mcore, model, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def far(vectors, options):\n    return 3 - vectors.cosine_Q() + vectors.labels_Q\n"
    )
    rows = [{"query": "ab", "positive": "ab", "label": 5.0}] * 8
    ran = mcore(
        "run", "--plugin", "sft", "--model", model, "--dataset", write(tmp_path / "r.jsonl", rows),
        "--save", tmp_path / "out", *SMALL, "--task_type", "embedding", "--train_iters", "1",
        "--loss_type", f"{tmp_path}/mine.py:far",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert metrics(ran.folder())[0]["loss"] == pytest.approx(7.0, abs=1e-4)
