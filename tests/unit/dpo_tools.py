"""A DPO recipe with options, and random pairs with what the reference says of them."""

from functools import cache

import numpy as np
from mcore_rlhf.config import ReferenceConfig, RLHFConfig
from mcore_rlhf.dpo.config import DPOConfig
from mcore_rlhf.dpo.recipe import DPORecipe
from preference_tools import View, config, logps_of, random_pair, template


@cache
def _config(options):
    return config(
        RLHFConfig,
        DPOConfig,
        ReferenceConfig,
        **{k: list(v) if isinstance(v, tuple) else v for k, v in options},
    )


@cache
def _template():
    return template()


def recipe(**options):
    lists = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    return DPORecipe(_config(tuple(lists.items())), _template())


def case(seed, pairs=None, scale=4.0):
    rng = np.random.default_rng(seed)
    units = [random_pair(rng, scale=scale) for _ in range(pairs or rng.integers(1, 5))]
    return units, logps_of(rng, units, scale=scale)


def prepared(made, units):
    """Attach what spans the global batch, with the reference's sums that the units have."""
    refs = {id(u["input_ids"]): u["ref_logps"] for u in units}

    def ref(unit):
        logps = np.zeros(unit["length"])
        logps[0], logps[unit["chosen_length"]] = refs[id(unit["input_ids"])]
        return logps

    bare = [{k: v for k, v in u.items() if k != "ref_logps"} for u in units]
    (found,) = made.prepare(bare, View(ref=ref))
    return found
