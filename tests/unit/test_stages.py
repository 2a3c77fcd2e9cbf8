"""Which layers a pipeline chunk holds."""

import pytest

from mcore_core.parallel.stages import (
    SplitOptions,
    chunk_ranges,
    expand_layout,
    layers_per_stage,
)


@pytest.mark.parametrize(
    ("text", "stages"),
    [
        ("Ett|ttL", ["Ett", "ttL"]),
        ("Et|(t|)*2tL", ["Et", "t", "t", "tL"]),
        ("Et*3|t*2L", ["Ettt", "ttL"]),
        ("E|(t|t|)*2tL", ["E", "t", "t", "t", "t", "tL"]),
        ("E t , t | t t L", ["Ett", "ttL"]),
        ("((t)*2|)*2L", ["tt", "tt", "L"]),
        ("Et||tL", ["Et", "", "tL"]),
        ("Ett|tmL", ["Ett", "tmL"]),
        ("Et*10|t*12L", ["E" + "t" * 10, "t" * 12 + "L"]),
        ("Et|(t|)*0tL", ["Et", "tL"]),
    ],
)
def test_expand_layout(text, stages):
    assert expand_layout(text) == stages


@pytest.mark.parametrize(
    ("text", "wrong"), [("Ett|xL", "x"), ("E(t|tL", "("), ("Et*|tL", "*"), ("Et2|tL", "2")]
)
def test_what_is_no_layout(text, wrong):
    with pytest.raises(ValueError) as caught:
        expand_layout(text)
    assert str(caught.value) == (f"{wrong!r} is not part of a pipeline layout (E, t, m, L, |, *N)")


def split(num_layers, pp, **options):
    return layers_per_stage(num_layers, SplitOptions(pipeline_model_parallel_size=pp, **options))


@pytest.mark.parametrize(
    ("layers", "pp", "options", "counts"),
    [
        (4, 1, {}, [4]),
        (4, 2, {}, [2, 2]),
        (8, 2, {"virtual": 2}, [2, 2, 2, 2]),
        (7, 2, {"account_for_embedding_in_pipeline_split": True}, [3, 4]),
        (7, 2, {"account_for_loss_in_pipeline_split": True}, [4, 3]),
        (
            10,
            4,
            {
                "account_for_embedding_in_pipeline_split": True,
                "account_for_loss_in_pipeline_split": True,
            },
            [2, 3, 3, 2],
        ),
        (
            2,
            2,
            {
                "virtual": 2,
                "account_for_embedding_in_pipeline_split": True,
                "account_for_loss_in_pipeline_split": True,
            },
            [0, 1, 1, 0],
        ),
        (7, 3, {"decoder_first_pipeline_num_layers": 1}, [1, 3, 3]),
        (7, 3, {"decoder_last_pipeline_num_layers": 3}, [2, 2, 3]),
        (
            8,
            4,
            {"decoder_first_pipeline_num_layers": 1, "decoder_last_pipeline_num_layers": 3},
            [1, 2, 2, 3],
        ),
        (
            5,
            2,
            {"decoder_first_pipeline_num_layers": 2, "decoder_last_pipeline_num_layers": 3},
            [2, 3],
        ),
        (5, 2, {"pipeline_model_parallel_layout": "Et|t*4L"}, [1, 4]),
        (4, 2, {"pipeline_model_parallel_layout": "Et|(t|)*2tL", "virtual": 2}, [1, 1, 1, 1]),
        (3, 4, {"pipeline_model_parallel_layout": "E|t|tt|L"}, [0, 1, 2, 0]),
    ],
)
def test_layers_per_stage(layers, pp, options, counts):
    assert split(layers, pp, **options) == counts
    assert sum(counts) == layers


@pytest.mark.parametrize(
    ("layers", "pp", "options", "text"),
    [
        (30, 4, {}, "30 layers do not divide over 4 stages (30 / 4); [2, 3, 5] do"),
        (
            30,
            2,
            {"virtual": 2, "account_for_embedding_in_pipeline_split": True},
            "30 layers and 1 for embedding and loss do not divide over 4 stages (31 / 4); "
            "[1, 31] do",
        ),
        (
            8,
            2,
            {
                "decoder_first_pipeline_num_layers": 3,
                "account_for_loss_in_pipeline_split": True,
            },
            "account_for_embedding/loss_in_pipeline_split and "
            "decoder_first/last_pipeline_num_layers cannot be combined",
        ),
        (
            8,
            2,
            {"decoder_first_pipeline_num_layers": 3, "virtual": 2},
            "decoder_first/last_pipeline_num_layers and virtual stages cannot be combined; "
            "use pipeline_model_parallel_layout",
        ),
        (
            8,
            3,
            {"decoder_first_pipeline_num_layers": 3},
            "8 layers less 3 on the first and 0 on the last stage leave 5, "
            "which do not divide over 2 stages",
        ),
        (
            4,
            2,
            {"decoder_first_pipeline_num_layers": 3, "decoder_last_pipeline_num_layers": 2},
            "4 layers less 3 on the first and 2 on the last stage leave -1, "
            "which do not divide over 0 stages",
        ),
        (
            6,
            2,
            {"decoder_first_pipeline_num_layers": 3, "decoder_last_pipeline_num_layers": 2},
            "6 layers less 3 on the first and 2 on the last stage leave 1, "
            "which do not divide over 0 stages",
        ),
        (
            4,
            1,
            {"decoder_first_pipeline_num_layers": 2, "decoder_last_pipeline_num_layers": 2},
            "4 layers less 2 on the first and 2 on the last stage leave 0, "
            "which do not divide over -1 stages",
        ),
        (
            4,
            2,
            {"pipeline_model_parallel_layout": "Et|t|ttL"},
            "layout 'Et|t|ttL' has 3 stages; the pipeline has 2 chunks",
        ),
        (
            5,
            2,
            {"pipeline_model_parallel_layout": "Ett|ttL"},
            "layout 'Ett|ttL' has 4 layers; the model has 5",
        ),
        (
            4,
            2,
            {"pipeline_model_parallel_layout": "tEt|ttL"},
            "layout 'tEt|ttL' must begin with E and end with L",
        ),
        (
            4,
            2,
            {"pipeline_model_parallel_layout": "Ett|tt"},
            "layout 'Ett|tt' must begin with E and end with L",
        ),
        (
            4,
            2,
            {"pipeline_model_parallel_layout": "EtLt|ttL"},
            "layout 'EtLt|ttL' must have one E and one L",
        ),
        (
            4,
            2,
            {"pipeline_model_parallel_layout": "Ett|tqL"},
            "'q' is not part of a pipeline layout (E, t, m, L, |, *N)",
        ),
    ],
)
def test_what_cannot_be_divided(layers, pp, options, text):
    with pytest.raises(ValueError) as caught:
        split(layers, pp, **options)
    assert str(caught.value) == text


def test_chunk_ranges():
    assert chunk_ranges([1, 0, 3]) == [range(1), range(1, 1), range(1, 4)]
