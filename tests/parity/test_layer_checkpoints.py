"""Checkpoints of models with special parts: the same bits in their layout, the same in others."""

import pytest
import test_checkpoint_layouts as saved
from layer_cases import LAYOUTS, layer_case
from sft_case import ADAM

from mcore_core.testing.cases import assert_same

SHARDED = {**ADAM, "use_distributed_optimizer": True}
RESHARDED = [
    ("mla-moe-mtp", "tp2-sp-ep2", SHARDED, ["tp2-sp-ep2", "pp2-ep2", "ep2"]),
    ("moe-gpt-oss", "ep2", ADAM, ["ep2", "tp2-sp-ep2"]),
    ("moe-softmax", "tp2-sp-etp2", SHARDED, ["one", "cp2"]),
    ("gdn", "tp2-sp", SHARDED, ["tp2-sp", "cp2", "pp2"]),
    ("postnorm", "tp2", SHARDED, ["one", "pp2"]),
    ("mtp-tied", "pp2", SHARDED, ["pp2", "one"]),
]


@pytest.mark.parametrize(
    ("name", "layout", "options", "others"), RESHARDED, ids=[f"{r[0]}-{r[1]}" for r in RESHARDED]
)
def test_resumes(tmp_path, name, layout, options, others):
    case = layer_case(name, saved.STEPS, **options)
    reference = saved._uninterrupted(case, LAYOUTS[layout], tmp_path)
    for other in others:
        flags, run = saved._resume(case, LAYOUTS[other], tmp_path)
        assert flags == (True, other == layout)
        if other == layout:
            saved._same_bits(run, reference)
        else:
            assert_same(run, reference, relative=1e-5)
