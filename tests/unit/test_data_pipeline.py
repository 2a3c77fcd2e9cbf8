"""From --dataset to loaders: what the options do, and every problem with them."""

from itertools import islice

import numpy as np
import pytest
from data_tools import chat, make_config, make_template, write_jsonl
from mcore_sft.recipe import SFTRecipe

from mcore_core.data.pipeline import build_data, open_data
from mcore_core.data.prepare import DataPlan, prepare_data
from mcore_core.errors import UsageError


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MCORE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def data(tmp_path):
    return write_jsonl(
        tmp_path / "x.jsonl", [chat(f"{i:02}", "a" * (i % 9 + 1)) for i in range(40)]
    )


def built(*, max_length=64, dp_rank=0, dp_size=1, on_writer=None, **options):
    options.setdefault("global_batch_size", 4)
    config = make_config(**options)
    template = make_template(max_length=max_length)
    return build_data(
        config,
        SFTRecipe(config, template),
        template,
        dp_rank=dp_rank,
        dp_size=dp_size,
        on_writer=on_writer,
    )


def questions(steps):
    template = make_template()
    return [template.describe(u).split("\n")[1][:2] for s in steps for micro in s for u in micro]


def error_of(**options):
    with pytest.raises(UsageError) as caught:
        built(**options)
    return str(caught.value)


EVERYTHING = [f"{i:02}" for i in range(40)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lazy_tokenize": True, "num_workers": 0},
        {"num_workers": 1},
        {"group_by_length": True},
        {"dataset_num_proc": 2},
        {"dataset_shuffle": False},
    ],
)
def test_an_epoch_has_every_row_once_in_another_order(data, options):
    bundle = built(dataset=[data], **options)
    first = questions(islice(bundle.train, 10))
    assert sorted(first) == EVERYTHING != first
    assert bundle.train.steps_per_epoch == 10
    again = built(dataset=[data], **options)
    assert questions(islice(again.train, 10)) == first


def test_dataset_shuffle_alone_keeps_one_order_for_all_epochs(data):
    bundle = built(dataset=[data], train_dataloader_shuffle=False)
    steps = questions(islice(bundle.train, 20))
    assert steps[:40] == steps[40:] != EVERYTHING


@pytest.mark.parametrize(
    "options",
    [
        {"train_dataloader_shuffle": False, "dataset_shuffle": False},
        {"dataloader_type": "single"},
    ],
)
def test_the_order_of_the_file_can_be_kept(data, options):
    assert questions(islice(built(dataset=[data], **options).train, 10)) == EVERYTHING


def test_lazy_and_eager_give_the_same_batches(data):
    """Global batches: which of a step's micro-batches a sample is in goes by its length."""
    lazy = built(dataset=[data], lazy_tokenize=True, num_workers=0)
    for mine, expected in zip(lazy.train, islice(built(dataset=[data]).train, 15), strict=False):
        assert sorted(questions([mine])) == sorted(questions([expected]))


def test_packing_reports_its_fill(data):
    bundle = built(dataset=[data], packing=True, packing_length=256, global_batch_size=1)
    items = list(islice(bundle.train, bundle.report.train_items))
    assert sorted(questions(items)) == EVERYTHING
    assert max(sum(u["length"] for u in micro) for s in items for micro in s) <= 256
    tokens = sum(c.tokens for c in bundle.report.train.values())
    assert bundle.report.packing_fill == tokens / (256 * bundle.report.train_items)
    assert list(bundle.report.lines())[-1].startswith(
        f"packed into {bundle.report.train_items} rows, {bundle.report.packing_fill:.1%} full"
    )


def test_the_report_counts_each_source(tmp_path, data):
    other = write_jsonl(tmp_path / "y.jsonl", [chat("99", "a" * 80), chat("98", "b"), {"text": ""}])
    bundle = built(dataset=[data, other])
    assert list(bundle.report.lines())[1:] == [
        f"train {other}: 1 of 3 rows, 24 tokens, 2 train",
        f"  dropped 1: longer than --max_length (first: {other}:1)",
        f"  dropped 1: malformed (first: {other}:3: 'text' is empty)",
    ]
    assert bundle.report.train_items == 41
    assert bundle.report.to_dict()["train"][other]["kept"] == 1
    assert len(questions(islice(bundle.train, 10))) == 40


def test_val_dataset_and_split(tmp_path, data):
    other = write_jsonl(tmp_path / "v.jsonl", [chat(f"{i}", "a") for i in range(50, 59)])
    bundle = built(dataset=[data], val_dataset=[other])
    assert questions(bundle.val) == [str(i) for i in range(50, 58)]
    assert len(built(dataset=[data], val_dataset=[other], eval_iters=1).val) == 1
    assert built(dataset=[data], val_dataset=[other], eval_iters=0).val is None
    split = built(dataset=[data], split_dataset_ratio=0.2)
    held, train = questions(split.val), questions(islice(split.train, 8))
    assert sorted(held + train) == EVERYTHING and len(held) == 8


def test_too_few_validation_rows_are_skipped_and_said_once(data):
    bundle = built(dataset=[data], split_dataset_ratio=0.05)
    assert bundle.val is None
    assert bundle.report.warnings == [
        "no evaluation: 2 validation samples, fewer than --global_batch_size 4"
    ]


def test_interleaving(tmp_path, data):
    other = write_jsonl(tmp_path / "y.jsonl", [chat(f"{i}", "b") for i in range(50, 60)])
    options = {"interleave_prob": [0.5, 0.5], "dataloader_type": "single"}
    bundle = built(dataset=[data, other], **options)
    got = questions(islice(bundle.train, bundle.report.train_items // 4))
    assert abs(sum(q >= "50" for q in got) / len(got) - 0.5) < 0.3
    assert bundle.report.train_items < 40
    full = built(dataset=[data, other], stopping_strategy="all_exhausted", **options)
    seen = questions(islice(full.train, full.report.train_items // 4 + 1))
    assert set(seen) == {*EVERYTHING, *(str(i) for i in range(50, 60))}


def test_ranks_share_the_global_batches(data):
    """Each step's samples are the same for any number of ranks; who has which may differ."""

    def steps(**options):
        return [
            sorted(questions([step])) for step in islice(built(dataset=[data], **options).train, 10)
        ]

    ranks = [steps(dp_rank=r, dp_size=2) for r in range(2)]
    assert [sorted(a + b) for a, b in zip(*ranks, strict=True)] == steps()


def test_ranks_have_about_the_same_to_do(tmp_path):
    """Lengths as chats have them: by chance one rank would have twice the tokens of another."""
    rng = np.random.default_rng(0)
    rows = [chat(f"{i}", "a" * int(n)) for i, n in enumerate(rng.lognormal(3, 1, 512))]
    path = write_jsonl(tmp_path / "x.jsonl", rows)

    def tokens(streaming):
        options = {"micro_batch_size": 2, "global_batch_size": 64, "max_length": 100_000}
        ranks = []
        for r in range(4):
            bundle = built(
                dataset=[path], streaming=streaming, num_workers=0, dp_rank=r, dp_size=4, **options
            )
            ranks.append(
                [[sum(u["length"] for u in m) for m in step] for step in islice(bundle.train, 6)]
            )
        return np.array(ranks)  # [rank, step, micro-batch]

    for streaming in (False, True):
        found = tokens(streaming)
        assert found.shape == (4, 6, 8)
        of_rank = found.sum(2)
        assert (of_rank.max(0) / of_rank.mean(0)).max() < 1.05
        assert (found.max(0) / found.mean(0)).mean() < 1.25  # micro-batches that run together


def test_the_plan_of_the_writer_reaches_the_others(data):
    plans = []

    def on_writer(make):
        if not plans:
            plans.append(make())
        return plans[0]

    first = built(dataset=[data], on_writer=on_writer)
    second = built(dataset=[data], on_writer=on_writer)
    assert isinstance(plans[0], DataPlan)
    assert first.fingerprint == second.fingerprint == plans[0].fingerprint
    assert questions(islice(first.train, 5)) == questions(islice(second.train, 5))


def test_the_writers_error_is_raised_where_the_sharing_raises_it(data):
    def on_writer(make):
        with pytest.raises(UsageError):
            make()
        raise UsageError([])

    with pytest.raises(UsageError):
        built(dataset=["gone.jsonl"], on_writer=on_writer)


def test_tokenized_data_that_is_not_here_is_an_error(tmp_path, data):
    config = make_config(dataset=[data])
    template = make_template(max_length=64)
    recipe = SFTRecipe(config, template)
    plan = prepare_data(config, recipe, template, loaders={})
    plan.train[0].unlink()
    with pytest.raises(UsageError, match=r"^error\[MC421\]: the tokenized data .* is not on this"):
        open_data(plan, config, recipe, template, loaders={})


def test_the_cache_is_reused_only_where_nothing_changed(tmp_path, data, monkeypatch):
    encoded = []
    original = SFTRecipe.encode

    def encode(self, row):
        encoded.append(row)
        return original(self, row)

    monkeypatch.setattr(SFTRecipe, "encode", encode)

    def count(**options):
        encoded.clear()
        built(dataset=[data], **options)
        return len(encoded)

    assert count(load_from_cache_file=True) == 40
    assert count(load_from_cache_file=True) == 0
    assert count(load_from_cache_file=True, data_seed=1, packing=True, packing_length=99) == 0
    assert count() == 40
    assert count(load_from_cache_file=True, max_length=60) == 40
    write_jsonl(tmp_path / "x.jsonl", [chat("q", "a")])
    assert count(load_from_cache_file=True) == 1


def test_the_fingerprint_follows_the_data_and_its_order(tmp_path, data):
    first = built(dataset=[data]).fingerprint
    assert built(dataset=[data]).fingerprint == first
    assert built(dataset=[data], packing=True).fingerprint != first
    write_jsonl(tmp_path / "x.jsonl", [chat("q", "a")] * 8)
    assert built(dataset=[data]).fingerprint != first


def test_columns_are_renamed_before_encoding(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"question": "11", "answer": "a"}] * 4)
    bundle = built(dataset=[path], columns={"question": "query", "answer": "response"})
    assert questions(islice(bundle.train, 1)) == ["11"] * 4


@pytest.mark.parametrize("drop", [True, False])
def test_unused_columns_reach_the_recipe_only_if_kept(tmp_path, monkeypatch, drop):
    seen = []
    original = SFTRecipe.encode
    monkeypatch.setattr(
        SFTRecipe, "encode", lambda self, row: seen.append(sorted(row)) or original(self, row)
    )
    path = write_jsonl(tmp_path / "x.jsonl", [chat("q", "a") | {"solution": 1}])
    built(dataset=[path], remove_unused_columns=drop)
    assert seen == [["messages"] if drop else ["messages", "solution"]]


def test_streaming_packs_and_evaluates_too(tmp_path, data):
    other = write_jsonl(tmp_path / "v.jsonl", [chat(f"{i}", "a") for i in range(50, 59)])
    bundle = built(
        dataset=[data],
        val_dataset=[other],
        streaming=True,
        num_workers=0,
        packing=True,
        packing_length=64,
        global_batch_size=2,
    )
    step = next(iter(bundle.train))
    assert len(step) == 2 and all(sum(u["length"] for u in m) <= 64 for m in step)
    assert sorted(questions(bundle.val))[:2] == ["50", "51"]


def test_streams_of_several_files(tmp_path, data):
    other = write_jsonl(tmp_path / "y.jsonl", [chat(f"{i}", "b") for i in range(50, 60)])
    options = {"streaming": True, "num_workers": 0, "dataset_shuffle": False}
    joined = questions(islice(built(dataset=[data, other], **options).train, 13))
    assert joined[:50] == [*EVERYTHING, *(str(i) for i in range(50, 60))]
    mixed = built(dataset=[data, other], interleave_prob=[0.5, 0.5], **options)
    assert {q >= "50" for q in questions(islice(mixed.train, 3))} == {True, False}


@pytest.mark.parametrize("packing", [{}, {"packing": True, "packing_length": 64}])
@pytest.mark.parametrize("stopping", ["first_exhausted", "all_exhausted"])
def test_interleaved_streams_resume_within_later_epochs(tmp_path, data, stopping, packing):
    other = write_jsonl(tmp_path / "y.jsonl", [chat(f"{i}", "b") for i in range(50, 60)])
    options = {"interleave_prob": [0.6, 0.4], "stopping_strategy": stopping, **packing}
    options |= {"dataset": [data, other], "streaming": True, "num_workers": 0}
    options |= {"shuffle_buffer_size": 7, "global_batch_size": 2}
    whole = built(**options)
    steps = iter(whole.train)
    before = questions(islice(steps, 40))
    assert len(before) > 60  # more than an epoch of the first to end
    cursor = whole.train.state_dict()
    resumed = built(**options)
    resumed.train.load_state_dict(cursor)
    rest = questions(islice(steps, 9))
    assert questions(islice(resumed.train, 9)) == rest
    assert {q >= "50" for q in rest} == {True, False}


# -- errors ----------------------------------------------------------------------------------------


def test_no_data():
    assert error_of() == "error[MC400]: there is no data\n  fix: --dataset FILE"


def test_every_problem_of_the_options_at_once(data):
    text = error_of(
        dataset=[data],
        max_length=None,
        interleave_prob=[1.0, 1.0],
        packing=True,
        lazy_tokenize=True,
        group_by_length=True,
        streaming=True,
        split_dataset_ratio=0.5,
        stopping_strategy="all_exhausted",
    )
    assert [line for line in text.split("\n") if line.startswith("error")] == [
        "error[MC409]: --interleave_prob has 2 values for 1 datasets",
        "error[MC418]: --packing true needs a length to pack to, and the model names no limit",
        "error[MC416]: --split_dataset_ratio 0.5 cannot be used with --streaming true: a stream's "
        "length is not known",
        "error[MC416]: --packing true cannot be used with --lazy_tokenize true: it needs the "
        "length of every sample beforehand",
        "error[MC416]: --group_by_length true cannot be used with --lazy_tokenize true: it needs "
        "the length of every sample beforehand",
        "error[MC416]: --group_by_length true cannot be used with --streaming true: it needs the "
        "length of every sample beforehand",
    ]


def test_all_rows_too_long(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [chat("q", "a" * 90)] * 3)
    assert error_of(dataset=[path]) == (
        f"error[MC410]: {path}: nothing is left to train on, all 3 rows were dropped\n"
        f"  3 x longer than --max_length (first: {path}:1)\n"
        "  fix: raise --max_length, or --truncation_strategy right cuts them"
    )


def test_one_file_of_which_nothing_parses_beside_a_good_one(tmp_path, data):
    (tmp_path / "bad.jsonl").write_text("x\n")
    text = error_of(dataset=[data, str(tmp_path / "bad.jsonl")])
    assert text.startswith(f"error[MC405]: {tmp_path / 'bad.jsonl'}: none of its 1 rows can be")


def test_packs_are_grouped_by_their_tokens(data):
    bundle = built(
        dataset=[data], packing=True, packing_length=64, group_by_length=True, global_batch_size=1
    )
    steps = list(islice(bundle.train, bundle.report.train_items))
    tokens = [sum(u["length"] for u in step[0]) for step in steps]
    assert sorted(bundle.train.batches.lengths.tolist()) == sorted(tokens)
