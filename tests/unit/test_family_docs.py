"""docs/reference/models.md is what its generator writes, and says what the tests prove."""

from importlib import resources
from pathlib import Path

from family_cases import CASES, DENSE_LAYOUTS, MOE_LAYOUTS
from mcore_hfbridge import models_doc
from mcore_hfbridge.missing import MISSING
from mcore_hfbridge.plugin import FAMILIES

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/reference/models.md"


def test_the_page_is_current():
    assert PAGE.read_text(encoding="utf-8") == models_doc.render(), (
        "run: python -m mcore_hfbridge.models_doc docs/reference/models.md"
    )


def test_layouts_are_those_of_the_tests():
    assert tuple(DENSE_LAYOUTS) == models_doc.DENSE_LAYOUTS
    assert tuple(MOE_LAYOUTS) == models_doc.MOE_LAYOUTS
    for case in CASES.values():
        family = models_doc.load(case.family)
        assert (models_doc.example(family).moe is not None) == case.moe, case.family


def test_every_family_of_transformers_is_here_or_said_to_be_missing():
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    named = [name for names in MISSING.values() for name in names]
    assert len(named) == len(set(named))
    assert not set(named) & set(FAMILIES)
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert set(named) <= known
    assert known - set(named) - set(FAMILIES) == set()
    own = {"kimi_k2", "internlm3", "mimo"}  # with code of their makers
    assert set(FAMILIES) - known <= own


def test_the_families_that_users_ask_for_are_here():
    asked = (
        "llama mistral mixtral qwen2 qwen2_moe qwen3 qwen3_moe qwen3_next deepseek_v2 deepseek_v3 "
        "kimi_k2 glm4 glm4_moe gpt_oss minimax_m2 ernie4_5 ernie4_5_moe olmoe internlm3 mimo "
        "gemma3_text phi3"
    )
    assert set(asked.split()) <= set(FAMILIES)


def test_families_are_short():
    """The median file of declarations has less than 80 lines."""
    files = resources.files("mcore_hfbridge.families")
    lines = sorted(len((files / f"{n}.py").read_text("utf-8").splitlines()) for n in FAMILIES)
    assert lines[len(lines) // 2] < 80
    assert lines[-1] < 120
