"""Options of dpo, kto and rm: as specified, and each contradiction is one message."""

import csv
from pathlib import Path

import pytest
from mcore_rlhf.dpo.config import DPOConfig

from mcore_core.cli.args import describe
from mcore_core.cli.prepare import open_session
from mcore_core.cli.run import prepare
from mcore_core.config.option import collect_options
from mcore_core.errors import UsageError
from mcore_core.testing.contracts import PluginContract

DATA = Path(__file__).parents[1] / "data"
SECTIONS = {"dpo": ("RLHF", "DPO"), "kto": ("RLHF", "KTO"), "rm": ("RLHF", "RM")}
CHOICES = {"f_divergence_type", ("kto", "loss_type")}
"""Specified as text; they have a list of choices here."""


class TestDPO(PluginContract):
    plugin = "dpo"


class TestKTO(PluginContract):
    plugin = "kto"


class TestRM(PluginContract):
    plugin = "rm"


def rows(plugin):
    with (DATA / "arguments.tsv").open(encoding="utf-8") as file:
        found = [r for r in csv.DictReader(file, delimiter="\t") if r["group"] in SECTIONS[plugin]]
    references = {"ref_model": "none", "ref_adapters": "[]"}
    if plugin != "rm":
        kind = {"ref_model": "str", "ref_adapters": "list[str]"}
        found += [
            {"name": n, "type": kind[n], "default": d, "accepted_alias": ""}
            for n, d in references.items()
        ]
    return found


def options(plugin):
    session = open_session()
    session.active = session.manager.activate([plugin])
    return {
        name: describe(option, session.defaults)
        for name, option in collect_options(session.groups).items()
    }


@pytest.mark.parametrize("plugin", SECTIONS)
def test_options_are_as_specified(plugin):
    found = options(plugin)
    for row in rows(plugin):
        option = found[row["name"]]
        default = option["default"]
        text = str(default).lower() if isinstance(default, bool) else str(default)
        assert text.replace("None", "none") == row["default"], row["name"]
        assert option["aliases"] == ([row["accepted_alias"]] if row["accepted_alias"] else [])
        choice = row["name"] in CHOICES or (plugin, row["name"]) in CHOICES
        assert option["type"] == ("choice" if choice else row["type"]), row["name"]


def problems(*argv):
    with pytest.raises(UsageError) as error:
        prepare(["--model", "m", "--dataset", "d", *map(str, argv)])
    return str(error.value)


REFUSED = {
    "another method": (
        ["dpo", "--rlhf_type", "kto"],
        "error[MC330]: --rlhf_type kto and --plugin dpo name different methods\n"
        "  fix: --plugin kto, or leave out --rlhf_type",
    ),
    "weights": (
        ["dpo", "--loss_type", "sigmoid,sft", "--loss_weights", "1"],
        "error[MC320]: --loss_weights has 1 values for 2 losses (sigmoid, sft)\n"
        "  fix: give one weight for each loss of --loss_type, in the same order",
    ),
    "an option that the loss does not read": (
        ["dpo", "--loss_type", "ipo", "--label_smoothing", "0.1"],
        "error[MC331]: --label_smoothing 0.1 does nothing with --loss_type ipo\n"
        "  losses that read it: aot, aot_unpaired, cpo, exo_pair, robust, sigmoid, sigmoid_norm, "
        "simpo\n"
        "  fix: leave out --label_smoothing, or choose one of these losses",
    ),
    "a divergence that the loss has not": (
        ["dpo", "--loss_type", "sigmoid,nca_pair", "--f_divergence_type", "js_divergence"],
        "error[MC331]: --f_divergence_type js_divergence is not defined for --loss_type nca_pair\n"
        "  losses that have it: discopop, exo_pair, hinge, ipo, robust, sigmoid, sigmoid_norm\n"
        "  fix: leave out --f_divergence_type, or choose one of these losses",
    ),
    "a divergence without a reference": (
        ["dpo", "--loss_type", "sft", "--f_divergence_type", "js_divergence"],
        "error[MC331]: --f_divergence_type js_divergence does nothing with --loss_type sft\n"
        "  losses that read it: discopop, exo_pair, hinge, ipo, robust, sigmoid, sigmoid_norm\n"
        "  fix: leave out --f_divergence_type, or choose one of these losses",
    ),
    "robust at a half": (
        ["dpo", "--loss_type", "robust", "--label_smoothing", "0.5"],
        "error[MC320]: --loss_type robust divides by 1 - 2 x label_smoothing, which "
        "--label_smoothing 0.5 makes 0\n"
        "  fix: --label_smoothing below 0.5",
    ),
    "a reference that nothing reads": (
        ["dpo", "--reference_free", "--ref_model", "x"],
        "error[MC331]: --ref_model does nothing: --reference_free true has no reference model\n"
        "  fix: leave out --ref_model",
    ),
    "a reference of simpo": (
        ["dpo", "--loss_type", "simpo", "--ref_load", "x"],
        "error[MC331]: --ref_load does nothing: --loss_type simpo has no reference model\n"
        "  fix: leave out --ref_load",
    ),
    "adapters twice": (
        ["kto", "--ref_adapters", "a", "--ref_adapter_load", "b"],
        "error[MC320]: --ref_adapters and --ref_adapter_load both give the reference's adapters\n"
        "  fix: keep one of them",
    ),
    "another start than the reference": (
        ["dpo", "--load", "run", "--finetune"],
        "error[MC320]: --finetune starts the policy from --load, and the reference would be "
        "--model\n"
        "  fix: --ref_load run for the policy as it starts, or --ref_model for another model",
    ),
    "two adapters": (
        ["dpo", "--ref_adapters", "a", "b"],
        "error[MC553]: --ref_adapters a b: a model has one adapter at a time\n"
        "  fix: merge the first with mcore export --merge_lora true, as --ref_model",
    ),
    "a batch of one": (
        ["kto", "--global_batch_size", "1"],
        "error[MC332]: a global batch of one answer: kto compares each prompt with the answer to "
        "another\n"
        "  fix: --global_batch_size 2 or more, or --loss_type apo_zero_unpaired",
    ),
    "no weight": (
        ["kto", "--desirable_weight", "0", "--undesirable_weight", "0"],
        "error[MC320]: --desirable_weight 0 and --undesirable_weight 0 leave nothing to train on\n"
        "  fix: give one of them another value",
    ),
    "per token": (
        ["rm", "--calculate_per_token_loss"],
        "error[MC310]: --calculate_per_token_loss true: the plugin 'rm' cannot use it: its loss "
        "is over pairs of answers, not tokens\n"
        "  fix: leave the option out",
    ),
    "an option of dpo alone": (
        ["rm", "--beta", "0.2"],
        "error[MC304]: unknown option --beta\n"
        "  it belongs to the plugin 'dpo', which is not active\n"
        "  fix: add it with --plugin dpo, or leave the option out",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    (plugin, *argv), text = REFUSED[name]
    assert problems("--plugin", plugin, *argv) == text


def test_a_batch_of_one_is_fine_without_the_estimate_or_with_packing():
    start = ["--plugin", "kto", "--model", "m", "--dataset", "d", "--global_batch_size", "1"]
    prepare([*start, "--loss_type", "apo_zero_unpaired"])
    prepare([*start, "--packing"])


def test_what_goes_on_from_a_run_may_name_its_reference():
    start = ["--plugin", "dpo", "--model", "m", "--dataset", "d", "--load", "run", "--finetune"]
    prepare([*start, "--ref_model", "m"])
    prepare([*start, "--reference_free"])
    prepare([*start, "--tuner_type", "lora"])
    prepare(start[:-1])  # a resumed run


def test_losses_and_weights():
    options = DPOConfig(loss_type=["sigmoid", "sft"], loss_weights=[1, 0.5])
    assert options.loss_type == "sigmoid,sft"
    assert (options.losses, options.weights) == (("sigmoid", "sft"), (1.0, 0.5))
    assert DPOConfig().weights == (1.0,)


@pytest.mark.parametrize("plugin", ["dpo", "kto"])
def test_a_reference_of_another_vocabulary(plugin, tmp_path):
    for name, size, words in (("m", 10, "abc"), ("size", 12, "abc"), ("words", 10, "acb")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(f'{{"vocab_size": {size}}}')
        vocabulary = ", ".join(f'"{w}": {i}' for i, w in enumerate(words))
        text = f'{{"model": {{"vocab": {{{vocabulary}}}}}}}'
        (tmp_path / name / "tokenizer.json").write_text(text)
    start = ["--plugin", plugin, "--model", f"{tmp_path}/m", "--ref_model"]
    model, other = f"{tmp_path}/m", f"{tmp_path}/size"
    with pytest.raises(UsageError) as error:
        prepare([*start, other, "--dataset", "d"])
    assert str(error.value) == (
        f"error[MC519]: the reference {other} has another vocabulary than the model\n"
        f"  vocab_size: 10 in {model}, 12 in {other}\n"
        "  fix: --ref_model with a model of the same tokenizer"
    )
    with pytest.raises(UsageError, match="give other ids to the same words"):
        prepare([*start, f"{tmp_path}/words", "--dataset", "d"])
    prepare([*start, model, "--dataset", "d"])
