"""A classifier or a bare model is read from and written as what transformers opens."""

from dataclasses import replace

import pytest
import torch
from bridge_models import load_ranks, rank_of
from family_cases import CASES, family_of, hf_config, write
from mcore_hfbridge.plan import Plan
from mcore_hfbridge.save import save
from transformers import AutoModel, AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSIFIERS,
)

from mcore_core.errors import UsageError
from mcore_core.model.hf_head import read_head, with_head, write_head
from mcore_core.model.resolve import read_hf_config
from mcore_core.protocols import HeadSpec

GB = 10**9
NAMES = [n for n, c in CASES.items() if c.model_type == c.family]
SCORED = [n for n in NAMES if CASES[n].model_type in CLASSIFIERS]


def with_spec(folder, name, spec):
    """Return the plan, the weights loaded from the folder and the config entries of the head."""
    family, said = family_of(CASES[name]), read_hf_config(folder)
    architecture = with_head(read_head(family.architecture(said), said), spec, said)
    plan = Plan(family, architecture)
    weights_of = load_ranks(plan, architecture, folder)
    return plan, weights_of, write_head(architecture, said)


def equal(model, other, prefix=""):
    for key, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[key.removeprefix(prefix)], tensor), key


@pytest.mark.parametrize("name", SCORED)
def test_classifier(tmp_path, name):
    """From a language model, with a new score head, and again from what was written."""
    model = write(tmp_path / "in", CASES[name])
    spec = HeadSpec(output="scores", scores=3)
    plan, weights_of, config = with_spec(tmp_path / "in", name, spec)
    assert weights_of[0]["score.weight"].isnan().all()  # left as it was drawn
    drawn = torch.randn(weights_of[0]["score.weight"].shape)
    weights_of[0]["score.weight"].copy_(drawn)
    ranks = rank_of(weights_of, 0)
    save(plan, weights_of[0], tmp_path / "out", ranks, GB, tmp_path / "in", config)
    again, report = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(report.values()), report
    assert (again.config.num_labels, again.config.architectures) == (3, config["architectures"])
    assert torch.equal(again.score.weight, drawn)
    equal(model.base_model, again.base_model)
    _, reloaded, config = with_spec(tmp_path / "out", name, spec)
    assert torch.equal(reloaded[0]["score.weight"], drawn)
    assert "id2label" not in config


@pytest.mark.parametrize("name", NAMES)
def test_bare_model(tmp_path, name):
    model = write(tmp_path / "in", CASES[name])
    plan, weights_of, config = with_spec(tmp_path / "in", name, HeadSpec(output="hidden"))
    assert not any("output_layer" in n or n.startswith("mtp") for n in plan.weights)
    ranks = rank_of(weights_of, 0)
    save(plan, weights_of[0], tmp_path / "out", ranks, GB, tmp_path / "in", config)
    again, report = AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    equal(model.base_model, again)
    with_spec(tmp_path / "out", name, HeadSpec(output="hidden"))


def test_another_number_of_labels(tmp_path):
    model = write(tmp_path / "in", CASES["llama"])
    model.config.num_labels = 2
    AutoModelForSequenceClassification.from_config(model.config).save_pretrained(tmp_path / "cls")
    with pytest.raises(UsageError, match="with 2 labels, the run needs 3"):
        with_spec(tmp_path / "cls", "llama", HeadSpec(output="scores", scores=3))


def test_a_table_names_what_it_leaves_out():
    """Prediction layers of a checkpoint are left out by name where another head is trained."""
    for name, prefix in (
        ("deepseek_v3", "model.layers.{n}."),
        ("qwen3_next", "mtp."),
        ("mimo", "model.mtp_layers.0."),
        ("ernie4_5_moe", "model.mtp_block."),
    ):
        case = CASES[name]
        family = family_of(case)
        bare = Plan(family, replace(_shape(case), head="none", mtp_layers=0))
        n = _shape(case).num_layers
        assert bare.is_ignored(prefix.format(n=n) + "x.weight"), name
        assert not bare.is_ignored(f"model.layers.{n - 1}.mlp.down_proj.weight"), name
        assert not Plan(family, _shape(case)).is_ignored("lm_head.weight")


def _shape(case):
    return family_of(case).architecture(hf_config(case).to_dict())
