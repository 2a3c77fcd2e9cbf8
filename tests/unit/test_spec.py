"""Every option of the specification in scope exists, with its default, choices, type and alias."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from mcore_core.config.export import ExportConfig
from mcore_core.config.kernel import KERNEL, KERNEL_GROUPS
from mcore_core.config.option import Option, collect_options

DATA = Path(__file__).parents[1] / "data"
KERNEL_SECTIONS = {
    "Training",
    "Learning Rate",
    "Regularization",
    "Checkpoint",
    "Distributed",
    "Logging",
    "Evaluation",
    "FP8",
    "Mixed Precision",
    "Model",
    "MLA",
    "MTP",
    "Mcore-Bridge",
    "Export",
    "Data",
    "Template",
    "Tuner",
    "Tuner: Full-parameter Training",
    "Tuner: LoRA Training",
}
LATER = {
    # of the sft plugin: test_sft_losses and test_task_data have them
    "enable_dft_loss",
    "enable_channel_loss",
    "task_type",
    "num_labels",
    "problem_type",
    # with the recipes that have a reference model
    "ref_model",
    "ref_adapters",
}
OTHER_DEFAULT = {
    "attention_backend": "auto",
    "transformer_impl": "auto",
    "distributed_backend": None,
    "report_to": [],
    "use_hf": True,
}
OTHER_CHOICES = {
    "optimizer": ["adam", "sgd", "muon", "dist_muon"],
    "ckpt_format": ["torch_dist"],
    "transformer_impl": ["auto", "local", "transformer_engine"],
    "attention_backend": ["auto", "flash", "fused", "unfused", "local"],
    "report_to": [],
    "tuner_type": [],  # and those that plugins bring
    # free text in the specification
    "logging_level": ["debug", "info", "warning", "error"],
    "test_convert_dtype": ["float32", "float16", "bfloat16"],
    "recompute_modules": [
        "core_attn",
        "mlp",
        "layernorm",
        "moe",
        "moe_act",
        "shared_experts",
        "mla_up_proj",
    ],
}
OTHER_TYPE = {
    "attention_backend": "choice",
    "logging_level": "choice",
    "test_convert_dtype": "choice",
    "report_to": "list[str]",
    "tuner_type": "str",
}


def rows() -> list[dict[str, str]]:
    found = []
    for name in ("arguments.tsv", "base_arguments.tsv"):
        with (DATA / name).open(encoding="utf-8") as file:
            found += list(csv.DictReader(file, delimiter="\t"))
    return [r for r in found if r["group"] in KERNEL_SECTIONS and r["name"] not in LATER]


OPTIONS = collect_options(dict.fromkeys((*KERNEL_GROUPS, ExportConfig), KERNEL))


def parse_default(text: str, kind: str, choices: list[str]) -> Any:
    if text == "none" and "none" not in choices:
        return None
    if kind == "bool":
        return text == "true"
    if kind in ("int", "float"):
        return float(text)
    if kind.startswith("list"):
        return json.loads(text.replace("'", '"'))
    return text


@pytest.mark.parametrize("row", rows(), ids=lambda r: r["name"])
def test_row(row: dict[str, str]) -> None:
    option: Option = OPTIONS[row["name"]]
    choices = row["choices"].split("|") if row["choices"] else []
    default = parse_default(row["default"], row["type"], choices)
    assert option.default == OTHER_DEFAULT.get(option.name, default)
    assert list(option.choices) == OTHER_CHOICES.get(option.name, choices)
    assert option.type_name == OTHER_TYPE.get(option.name, row["type"])
    alias = row.get("accepted_alias")
    assert list(option.aliases) == ([alias] if alias else [])
    assert option.help and option.help.replace("_", " ") != option.name.replace("_", " ")


def test_sections_are_those_of_the_specification() -> None:
    by_title = {r["name"]: r["group"] for r in rows()}
    moved = {
        "model_revision": "Mcore-Bridge",  # Model in the specification
        "torch_dtype": "Mixed Precision",  # Model in the specification
        "save_strategy": "Checkpoint",  # Training in the specification
        "merge_lora": "Mcore-Bridge",  # Export, too, in the specification
    }
    for name, group in by_title.items():
        assert OPTIONS[name].group.title == moved.get(name, group), name


def test_only_these_options_are_beyond_the_specification() -> None:
    assert set(OPTIONS) - {r["name"] for r in rows()} == {
        "nproc_per_node",
        "nnodes",
        "node_rank",
        "master_addr",
        "master_port",
        "upcycle",
        "moe_upcycling_granularity",
    }


def test_the_exceptions_are_still_exceptions() -> None:
    by_name = {r["name"]: r for r in rows()}
    for name, default in OTHER_DEFAULT.items():
        assert parse_default(by_name[name]["default"], by_name[name]["type"], []) != default, name
    for name, kind in OTHER_TYPE.items():
        assert by_name[name]["type"] != kind, name
