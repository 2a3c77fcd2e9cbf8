"""Merging defaults, files and flags; what a dump gives back; messages about wrong values."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mcore_core.config.compose import compose
from mcore_core.config.distributed import DistributedConfig
from mcore_core.config.kernel import KERNEL_GROUPS, kernel_config
from mcore_core.config.learning_rate import LearningRateConfig
from mcore_core.config.model import ModelConfig
from mcore_core.config.option import Option, collect_options
from mcore_core.config.source import COMMAND_LINE, Source, read_yaml
from mcore_core.errors import UsageError

GROUPS = dict.fromkeys(KERNEL_GROUPS, "kernel")
OPTIONS = collect_options(GROUPS)


def errors(*sources: Source, **more: Any) -> list[str]:
    with pytest.raises(UsageError) as caught:
        compose(GROUPS, sources, **more)
    return [str(p) for p in caught.value.problems]


def flags(**values: Any) -> Source:
    return Source(COMMAND_LINE, values)


def test_flags_over_later_files_over_earlier_files_over_recipe_over_defaults() -> None:
    config = compose(
        GROUPS,
        [
            Source("a.yaml", {"seed": 1, "lr": 1e-3, "num_workers": 1}),
            Source("b.yaml", {"seed": 2, "lr": 1e-4}),
            flags(seed="3"),
        ],
        defaults={"seed": 9, "min_lr": 1e-7, "clip_grad": 0.5},
    )
    names = ("seed", "lr", "num_workers", "min_lr", "clip_grad", "weight_decay")
    assert [config.get(n) for n in names] == [3, 1e-4, 1, 1e-7, 0.5, 0.1]
    assert [config.is_set(n) for n in names] == [True, True, True, False, False, False]
    assert [config.changed(n) for n in names] == [True, True, True, False, False, False]
    assert config[LearningRateConfig].model_fields_set == {"lr"}


def test_an_alias_in_one_source_may_override_the_name_in_another() -> None:
    config = compose(GROUPS, [Source("a.yaml", {"save_interval": 5}), flags(save_steps="7")])
    assert config.get("save_interval") == 7


def test_kebab_case() -> None:
    config = compose(GROUPS, [Source("a.yaml", {"lr-decay-style": "linear"})])
    assert config.get("lr_decay_style") == "linear"


@pytest.mark.parametrize(
    ("name", "typed", "value"),
    [
        ("lr", "1e-5", 1e-5),
        ("packing", "yes", True),
        ("packing", "False", False),
        ("dataset", "a.jsonl", ["a.jsonl"]),
        ("dataset", ["a", "b"], ["a", "b"]),
        ("dataset", '["a", "b"]', ["a", "b"]),
        ("dataset", ["none"], []),
        ("interleave_prob", ["0.5", "5e-1"], [0.5, 0.5]),
        ("interleave_prob", "none", None),
        ("columns", '{"q": "query"}', {"q": "query"}),
        ("megatron_extra_kwargs", {"a": {"b": ["1e-5", "x"]}}, {"a": {"b": [1e-5, "x"]}}),
        ("recompute_granularity", "none", "none"),
        ("position_embedding_type", "none", "none"),
        ("train_iters", "none", None),
        ("bf16", "null", None),
        ("window_size", 128, "128"),
        ("wandb_exp_name", 1.5, "1.5"),
        ("report_to", "none", []),
        ("eval_iters", "-1", -1),
        ("adam_beta2", 0, 0.0),
    ],
)
def test_values(name: str, typed: Any, value: Any) -> None:
    assert compose(GROUPS, [flags(**{name: typed})]).get(name) == value


@pytest.mark.parametrize(
    ("name", "typed", "text"),
    [
        ("micro_batch_size", "two", "expected a whole number, got 'two'"),
        ("micro_batch_size", "0", "must be at least 1, got '0'"),
        ("micro_batch_size", 1.5, "expected a whole number, got 1.5"),
        ("micro_batch_size", True, "expected a whole number, got true"),
        ("lr", "fast", "expected a number, got 'fast'"),
        ("lr", "0", "must be more than 0, got '0'"),
        ("lr", "nan", "must be finite, got 'nan'"),
        ("adam_beta1", "1", "must be less than 1, got '1'"),
        ("split_dataset_ratio", "1", "must be less than 1, got '1'"),
        ("optimizer_offload_fraction", "2", "must be at most 1, got '2'"),
        ("packing", "maybe", "expected true or false, got 'maybe'"),
        ("save", True, "expected text, got true"),
        ("min_lr", None, "expected a number, got none"),
        ("rope_scaling", "[1]", "expected a JSON object, got [1]"),
        (
            "columns",
            "{q: 1}",
            "not valid JSON: expecting property name enclosed in double quotes at character 2 of "
            "'{q: 1}'; write it as '{\"key\": \"value\"}', in single quotes for the shell",
        ),
        ("max_shard_size", "big", "expected a size such as 5GB, 500MB or 2GiB, got 'big'"),
        (
            "loss_scale",
            "first",
            "expected one of default, last_round, all, with or without +ignore_empty_think, "
            "got 'first'",
        ),
        ("hub_token", True, "expected text"),  # and the value is not shown
    ],
)
def test_wrong_values(name: str, typed: Any, text: str) -> None:
    assert errors(flags(**{name: typed})) == [f"error[MC302]: --{name}: {text}"]


def test_wrong_choices_get_a_hint() -> None:
    assert errors(flags(optimizer="adamw")) == [
        "error[MC302]: --optimizer: expected one of adam, sgd, muon, dist_muon, got 'adamw'\n"
        "  did you mean: adam?"
    ]


def test_wrong_items_are_numbered() -> None:
    assert errors(flags(interleave_prob=["0.5", "half"])) == [
        "error[MC302]: --interleave_prob item 2: expected a number, got 'half'"
    ]


def test_unknown_options_and_all_problems_at_once() -> None:
    found = errors(
        Source("run.yaml", {"lrr": 1, "devices": 8, "beta": 0.1}, {"lrr": 1, "devices": 2}),
        flags(packng="true", seed="x"),
        inactive={"beta": "dpo"},
    )
    assert found == [
        "error[MC301]: unknown option run.yaml:1: lrr\n  did you mean: lr?",
        "error[MC301]: unknown option run.yaml:2: devices\n  fix: `mcore args` lists the options",
        "error[MC304]: unknown option run.yaml: beta\n"
        "  it belongs to the plugin 'dpo', which is not active\n"
        "  fix: add it with --plugin dpo, or leave the option out",
        "error[MC301]: unknown option --packng\n  did you mean: --packing, --packing_length?",
        "error[MC302]: --seed: expected a whole number, got 'x'",
    ]


def test_an_option_and_its_alias_in_one_place() -> None:
    assert errors(flags(save_interval=1, save_steps=2)) == [
        "error[MC306]: --save_steps and --save_interval are two spellings of one option\n"
        "  fix: keep one of them; save_interval is the name"
    ]


def test_replace_checks_and_marks() -> None:
    config = kernel_config(seed=1)
    changed = config.replace(lr=1e-4)
    assert (changed.get("lr"), changed.get("seed"), config.get("lr")) == (1e-4, 1, None)
    assert changed.is_set("lr")
    with pytest.raises(UsageError, match="lr: must be more than 0, got -1"):
        config.replace(lr=-1)


def test_a_dump_leaves_out_what_the_checkpoint_decides_and_secrets() -> None:
    dump = kernel_config(num_query_groups=1, hub_token="s3cret").dump()
    assert {n for n in ModelConfig.model_fields if n in dump} == {"num_query_groups"}
    assert "hub_token" not in dump
    assert "s3cret" not in repr(kernel_config(hub_token="s3cret"))
    assert set(DistributedConfig.model_fields) <= set(dump)


def test_a_config_can_be_sent_to_other_processes() -> None:
    config = kernel_config(lr=1e-4, dataset=["a"])
    again = pickle.loads(pickle.dumps(config))
    assert again == config
    assert again.is_set("lr") and not again.is_set("seed")


def test_get_of_what_no_group_has() -> None:
    with pytest.raises(KeyError):
        kernel_config().get("beta")


TEXT = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S", "Zs")), max_size=12)


def values_of(option: Option) -> st.SearchStrategy[Any]:
    items: dict[Any, st.SearchStrategy[Any]] = {
        int: st.integers(1, 60000),
        float: st.floats(1e-9, 0.99, allow_nan=False),
        bool: st.booleans(),
        str: TEXT,
    }
    if option.name == "max_shard_size":
        return st.sampled_from(["5GB", "1 MB"])
    if option.name == "loss_scale":
        return st.sampled_from(["all", "last_round+ignore_empty_think"])
    if option.choices:
        item: st.SearchStrategy[Any] = st.sampled_from(option.choices)
    elif option.shape == "json":
        number = st.floats(allow_nan=False, allow_infinity=False)
        inner = TEXT if option.name == "columns" else TEXT | number | st.integers() | st.booleans()
        return st.dictionaries(TEXT, inner, max_size=3)
    else:
        item = items[option.item]
    return st.lists(item, max_size=3) if option.shape == "list" else item


@st.composite
def given_options(draw: st.DrawFn) -> dict[str, Any]:
    usable = sorted(n for n, o in OPTIONS.items() if not o.secret)
    names = draw(st.lists(st.sampled_from(usable), unique=True, max_size=12))
    return {name: draw(values_of(OPTIONS[name])) for name in names}


@settings(max_examples=60, deadline=None)
@given(given_options())
def test_loading_a_dump_gives_an_equal_config(values: dict[str, Any]) -> None:
    config = kernel_config(**values)
    again = kernel_config(**yaml.safe_load(yaml.safe_dump(config.dump())))
    assert again == config
    assert again.dump() == config.dump()
    assert [n for n in config.names if again.changed(n)] == [
        n for n in config.names if config.changed(n)
    ]


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_yaml(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.yaml", "# c\nlr: 1e-5\ndataset: [a, b]\nwandb_exp_name: 2026-01-02\n"
    )
    source = read_yaml(path)
    assert source.values == {"lr": "1e-5", "dataset": ["a", "b"], "wandb_exp_name": "2026-01-02"}
    assert source.spell("dataset") == f"{path}:3: dataset"
    assert read_yaml(write(tmp_path / "empty.yaml", "# nothing\n")).values == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "lr: 1\nseed: 2\nlr: 3\n",
            "error[MC307]: {path}:3: 'lr' is already given on line 1\n"
            "  fix: keep one of the two lines",
        ),
        (
            "columns: {{a: b,\n  a: c}}\n",
            "error[MC307]: {path}:2: 'a' is already given on line 1\n"
            "  fix: keep one of the two lines",
        ),
        (
            "lr: 1\nseed: [1, 2\n",
            "error[MC308]: {path}:3: not valid YAML: while parsing a flow sequence, expected ',' "
            "or ']', but got '<stream end>'\n  fix: write 'option: value' with a space after the "
            "colon; quote text that has ': ' or '#'",
        ),
        (
            "system: be: kind\n",
            "error[MC308]: {path}:1: not valid YAML: mapping values are not allowed here\n"
            "  fix: write 'option: value' with a space after the colon; quote text that has ': ' "
            "or '#'",
        ),
        (
            "# x\n- lr\n",
            "error[MC303]: {path}:2: expected 'option: value' lines\n"
            "  fix: write one option a line, for example 'lr: 1e-5'",
        ),
    ],
)
def test_wrong_yaml(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "a.yaml", text.replace("{{", "{").replace("}}", "}"))
    with pytest.raises(UsageError) as caught:
        read_yaml(path)
    assert str(caught.value) == message.format(path=path)


def test_missing_yaml(tmp_path: Path) -> None:
    path = str(tmp_path / "none.yaml")
    with pytest.raises(UsageError) as caught:
        read_yaml(path)
    assert str(caught.value) == (
        f"error[MC309]: cannot read the options file {path!r}: No such file or directory\n"
        "  fix: give the path of a YAML file of 'option: value' lines"
    )
