"""Options of the tasks: what is refused, and what a run says of its result."""

import csv
import json
from pathlib import Path

import pytest
from mcore_sft.tasks.components import CAUSAL_LM, TASKS
from mcore_sft.tasks.config import TaskConfig
from mcore_sft.tasks.rules import check
from task_tools import ANSWERS, config

from mcore_core.config.option import collect_options
from mcore_core.errors import UsageError
from mcore_core.plugin import hookimpl
from mcore_core.report.summary import _use


def problems(task, **options):
    return [p.message for p in check(config(task_type=task, **options))]


def test_options_are_those_of_the_specification():
    with (Path(__file__).parents[1] / "data/arguments.tsv").open(encoding="utf-8") as file:
        rows = {row["name"]: row for row in csv.DictReader(file, delimiter="\t")}
    options = collect_options({TaskConfig: "sft"})
    assert options["task_type"].default == rows["task_type"]["default"]
    names = {CAUSAL_LM, *(task.name for task in TASKS)}
    assert names == set(rows["task_type"]["choices"].split("|"))
    assert options["num_labels"].default is None
    assert options["problem_type"].default is None
    assert list(options["problem_type"].choices) == rows["problem_type"]["choices"].split("|")


@pytest.mark.parametrize(
    ("architectures", "files", "opener"),
    [
        (["Qwen3ForCausalLM"], [], "AutoModelForCausalLM.from_pretrained"),
        (
            ["Qwen3ForSequenceClassification"],
            [],
            "AutoModelForSequenceClassification.from_pretrained",
        ),
        (["Qwen3Model"], ["modules.json"], "SentenceTransformer"),
    ],
)
def test_a_run_says_what_opens_its_model(tmp_path, architectures, files, opener):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": architectures}))
    for name in ("model.safetensors", *files):
        (tmp_path / name).write_text("")
    assert dict(_use(tmp_path, None))["load it"] == f'{opener}("{tmp_path}")'


@pytest.mark.parametrize(
    ("task", "options", "what"),
    [
        ("seq_cls", {}, "needs to know how many labels there are"),
        (
            "seq_cls",
            {"num_labels": 1, "problem_type": "single_label_classification"},
            "--num_labels 1 is a single class",
        ),
        ("causal_lm", {"num_labels": 2}, "--num_labels 2 does nothing without --task_type seq_cls"),
        ("causal_lm", {"loss_type": "infonce"}, "without --task_type embedding or generative_re"),
        ("seq_cls", {"num_labels": 2, "loss_scale": "all"}, "--loss_scale all does nothing"),
        ("embedding", {"enable_dft_loss": True}, "--enable_dft_loss true does nothing"),
        ("embedding", {"num_labels": 2}, "--num_labels 2 does nothing"),
        ("embedding", {"max_negative_samples": 2}, "--max_negative_samples 2 does nothing"),
        ("embedding", {"contrastive_margin": 1}, "a --loss_type with contrastive"),
        (
            "embedding",
            {"loss_type": "contrastive", "infonce_temperature": 1},
            "a --loss_type with infonce",
        ),
        ("embedding", {"loss_type": "infonce,contrastive"}, "a task has one loss"),
        ("embedding", {"mrl_dims": [4, 4]}, "the sizes must differ"),
        ("embedding", {"mrl_dims": [4], "mrl_weights": [1, 2]}, "--mrl_weights has 2 numbers"),
        ("embedding", {"mrl_weights": [1]}, "--mrl_weights has 1 numbers, --mrl_dims 0"),
        (
            "embedding",
            {"infonce_use_batch": False, "infonce_include_qq": True},
            "--infonce_include_qq true compares with the micro-batch",
        ),
        (
            "generative_reranker",
            {"reranker_positive_token": "no"},
            "are both 'no'",
        ),
        (
            "generative_reranker",
            {"listwise_reranker_temperature": 2},
            "a --loss_type with listwise",
        ),
    ],
)
def test_contradictions(task, options, what):
    (message,) = problems(task, **options)
    assert what in message


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("causal_lm", {"loss_scale": "all"}),
        ("seq_cls", {"num_labels": 1}),
        ("embedding", {"loss_type": "./my.py:loss", "contrastive_margin": 1}),
        ("embedding", {"loss_type": "online_contrastive", "contrastive_margin": 1}),
        ("embedding", {"mrl_dims": [8, 4], "mrl_weights": [1, 2]}),
        ("generative_reranker", {**ANSWERS, "loss_type": "listwise_reranker"}),
        ("another", {"num_labels": 2}),
    ],
)
def test_no_contradictions(task, options):
    assert problems(task, **options) == []


def test_a_task_of_another_plugin(monkeypatch):
    from mcore_sft.tasks import components

    from mcore_core.component import Component
    from mcore_core.manager import PluginManager

    class Other:
        role = "support"

        @hookimpl
        def mcore_tasks(self):
            return [Component("parrot", "parrot:Parrot")]

    load = PluginManager.load_installed

    def with_other(self):
        load(self)
        self.register(Other(), "other")

    monkeypatch.setattr(PluginManager, "load_installed", with_other)
    assert components.named("parrot").target == "parrot:Parrot"
    for task in TASKS:
        assert components.named(task.name) is task
    with pytest.raises(UsageError) as caught:
        components.named("parot")
    assert "no task named 'parot' (from --task_type)" in caught.value.problems[0].message
    assert "did you mean: parrot?" in str(caught.value.problems[0].notes)
