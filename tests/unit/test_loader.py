"""The loaders: determinism, resume, shares, evaluation, streams."""

from itertools import islice

import numpy as np
import pytest
from data_tools import chat, make_config, make_template, write_jsonl
from mcore_sft.recipe import SFTRecipe

from mcore_core.data.encode import LazyUnits, RowEncoder
from mcore_core.data.files import ListRows
from mcore_core.data.loader import EvalLoader, Items, TrainLoader, Workers
from mcore_core.data.mix import interleave
from mcore_core.data.sampler import GlobalBatches, Share
from mcore_core.data.stream import Stream, StreamLoader, StreamOptions, interleaved, shuffled
from mcore_core.errors import UsageError


def units(n):
    return [{"id": i, "length": i % 5 + 1} for i in range(n)]


def loader(n=23, *, packs=None, share=None, num=0, seed=0, fingerprint="f"):
    share = share or Share(global_batch_size=4, micro_batch_size=2)
    items = Items(units(n), packs)
    batches = GlobalBatches(len(items), share.global_batch_size, seed=seed)
    workers = Workers(num=num)
    return TrainLoader(items, batches, share=share, workers=workers, fingerprint=fingerprint)


def ids(steps):
    return [[[u["id"] for u in micro] for micro in step] for step in steps]


def test_any_number_of_workers_gives_the_same_steps():
    expected = ids(islice(loader(), 15))
    assert ids(islice(loader(num=2), 15)) == expected
    assert [len(step) for step in expected] == [2] * 15


@pytest.mark.parametrize("num", [0, 2])
def test_a_resumed_loader_continues_as_the_uninterrupted_one(num):
    whole = ids(islice(loader(), 15))
    first = loader(num=num)
    begun = ids(islice(first, 7))
    state = first.state_dict()
    assert state["consumed"] == 7
    resumed = loader(num=num)
    resumed.load_state_dict(state)
    assert begun + ids(islice(resumed, 8)) == whole
    assert resumed.epoch() == 15 * 4 / 23


def test_a_resume_at_another_layout_gives_the_same_global_batches():
    def global_batches(size, start, count):
        ranks = []
        for rank in range(size):
            one = loader(share=Share(global_batch_size=4, micro_batch_size=1, rank=rank, size=size))
            one.load_state_dict(one.state_dict() | {"consumed": start})
            ranks.append(ids(islice(one, count)))
        micro = 4 // size
        return [
            [i for j in range(micro) for rank in ranks for i in rank[step][j]]
            for step in range(count)
        ]

    expected = global_batches(1, 0, 10)
    assert global_batches(2, 0, 10) == expected
    assert global_batches(4, 3, 7) == expected[3:]


def test_packs_are_handed_out_whole():
    packs = [[0, 1], [2], [3, 4, 5], [6]]
    one = loader(7, packs=packs, share=Share(global_batch_size=2, micro_batch_size=1))
    seen = [micro for step in ids(islice(one, 2)) for micro in step]
    assert sorted(seen) == packs


def test_another_data_set_cannot_be_resumed():
    state = loader().state_dict() | {"consumed": 3}
    with pytest.raises(UsageError) as caught:
        loader(24, seed=1, fingerprint="g").load_state_dict(state)
    assert str(caught.value) == (
        "error[MC420]: the checkpoint's position in the data does not fit this run's data\n"
        "  --data_seed: it was 0, it is 1\n"
        "  the number of samples: it was 23, it is 24\n"
        "  the content of the data, the tokenizer or an option that encodes: it was f, it is g\n"
        "  fix: restore what changed, or --finetune true to begin the data anew"
    )


@pytest.mark.parametrize("num", [0, 1])
def test_a_users_error_in_a_worker_arrives_as_one(num):
    recipe = SFTRecipe(make_config(), make_template(max_length=5))
    lazy = LazyUnits(ListRows([chat("q", "a")], "x"), RowEncoder(recipe=recipe), "x")
    one = TrainLoader(
        Items(lazy),
        GlobalBatches(1, 1),
        share=Share(global_batch_size=1, micro_batch_size=1),
        workers=Workers(num=num),
    )
    with pytest.raises(UsageError, match=r"^error\[MC410\]: x: nothing is left to train on"):
        next(iter(one))


def test_evaluation_takes_whole_global_batches_in_order_each_time():
    share = Share(global_batch_size=4, micro_batch_size=2)
    one = EvalLoader(Items(units(11)), share=share)
    assert len(one) == 2
    assert ids(one) == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]] == ids(one)
    assert len(EvalLoader(Items(units(11)), share=share, iters=1)) == 1
    assert len(EvalLoader(Items(units(11)), share=share, iters=9)) == 2


# -- streams ---------------------------------------------------------------------------------------

SHARE = Share(global_batch_size=4, micro_batch_size=1)


def stream(n=30, **options):
    recipe = SFTRecipe(make_config(), make_template(max_length=64))
    rows = [chat(f"{i:02}", "a" * (i % 9 + 1)) for i in range(n)]
    options.setdefault("buffer_size", 8)
    return Stream(
        lambda epoch: iter(rows),
        RowEncoder(recipe=recipe),
        StreamOptions(seed=1, **options),
        name="rows",
    )


def questions(steps):
    template = make_template()
    return [
        [[template.describe(u).split("\n")[1][:2] for u in micro] for micro in step]
        for step in steps
    ]


@pytest.mark.parametrize("packing", [None, 100])
@pytest.mark.parametrize("num", [0, 1])
def test_a_resumed_stream_gives_the_batches_of_the_uninterrupted_one(packing, num):
    def new(num):
        return StreamLoader(stream(packing_length=packing), share=SHARE, workers=Workers(num=num))

    whole = questions(islice(new(0), 20))
    first = new(num)
    begun = questions(islice(first, 7))
    resumed = new(num)
    resumed.load_state_dict(first.state_dict())
    assert begun + questions(islice(resumed, 13)) == whole


@pytest.mark.parametrize("packing", [None, 100])
def test_a_stream_has_each_row_once_an_epoch(packing):
    items = list(islice(stream(packing_length=packing), 200))
    flat = [q for step in questions([items]) for micro in step for q in micro]
    everything = [f"{i:02}" for i in range(30)]
    assert sorted(flat[:30]) == everything and flat[:30] != everything
    assert sorted(flat[30:60]) == everything and flat[30:60] != flat[:30]
    if packing:
        assert max(sum(u["length"] for u in item) for item in items) <= 100
        assert max(len(item) for item in items) > 1


def test_without_shuffling_a_stream_keeps_the_order():
    items = list(islice(stream(shuffle=False), 60))
    assert [m[0] for m in questions([items])[0]] == [f"{i:02}" for i in range(30)] * 2


def test_a_streams_ranks_share_its_global_batches():
    parts = [
        questions(
            islice(
                StreamLoader(
                    stream(),
                    share=Share(global_batch_size=4, micro_batch_size=1, rank=r, size=2),
                ),
                5,
            )
        )
        for r in range(2)
    ]
    whole = questions(islice(StreamLoader(stream(), share=SHARE), 5))
    for step in range(5):
        a, b = parts[0][step], parts[1][step]
        assert [a[0], b[0], a[1], b[1]] == whole[step]


@pytest.mark.parametrize("num", [0, 1])
def test_a_stream_of_which_nothing_is_left_ends_with_an_error(num):
    recipe = SFTRecipe(make_config(), make_template(max_length=5))
    empty = Stream(
        lambda epoch: iter([chat("q", "a")]),
        RowEncoder(recipe=recipe),
        StreamOptions(),
        name="rows",
    )
    with pytest.raises(UsageError, match="rows: nothing is left to train on, all 1 rows"):
        next(iter(StreamLoader(empty, share=SHARE, workers=Workers(num=num))))


def test_shuffled_moves_values_no_further_forward_than_the_buffer():
    out = list(shuffled(iter(range(100)), 10, np.random.default_rng(0)))
    assert sorted(out) == list(range(100)) != out
    assert all(value - at < 10 for at, value in enumerate(out))


@pytest.mark.parametrize("all_exhausted", [False, True])
@pytest.mark.parametrize("sizes", [(4, 100), (30, 7, 12)])
def test_interleaving_a_stream_is_interleaving_a_table(sizes, all_exhausted):
    """Which values come, how often, and where it ends: as mix.interleave says for known sizes."""

    class Draws:
        """The numbers that mix.interleave draws for its seed, one at a time."""

        def __init__(self, shares):
            self.rng, self.waiting = np.random.default_rng([3, 2]), []
            self.shares, self.size = shares, sum(sizes) + 64

        def choice(self, n, p):
            if not self.waiting:
                self.waiting = self.rng.choice(n, size=self.size, p=p).tolist()
            return self.waiting.pop(0)

    shares = np.arange(1, len(sizes) + 1) / sum(range(1, len(sizes) + 1))
    starts = np.cumsum([0, *sizes])
    parts = [
        lambda a=a, n=n: iter(range(a, a + n)) for a, n in zip(starts, sizes, strict=False)
    ]  # fmt: skip
    out = list(interleaved(parts, shares, Draws(shares), all_exhausted=all_exhausted))
    stopping = "all_exhausted" if all_exhausted else "first_exhausted"
    assert out == interleave(sizes, list(shares), seed=3, stopping=stopping).tolist()


def test_interleaving_skips_an_empty_part():
    rng = np.random.default_rng(0)
    opens = [lambda: iter(()), lambda: iter("abc")]
    assert list(interleaved(opens, [0.5, 0.5], rng, all_exhausted=True)) == list("abc")
    assert list(interleaved(opens, [0.5, 0.5], rng)) == []


def test_a_stream_reads_files_again_each_epoch(tmp_path):
    from mcore_core.data.pipeline import build_data

    path = write_jsonl(tmp_path / "x.jsonl", [chat(f"{i:02}", "a") for i in range(6)])
    config = make_config(dataset=[path], streaming=True, global_batch_size=4, num_workers=0)
    template = make_template()
    bundle = build_data(config, SFTRecipe(config, template), template)
    flat = [q for s in questions(islice(bundle.train, 3)) for m in s for q in m]
    assert sorted(flat[:6]) == sorted(flat[6:]) == [f"{i:02}" for i in range(6)]
    assert bundle.train.steps_per_epoch is None and bundle.val is None
