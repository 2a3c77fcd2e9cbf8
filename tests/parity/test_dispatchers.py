"""A dispatcher of a third party is found by its name and takes the tokens."""

import dataclasses
from functools import cache

import pytest
from layer_cases import LAYOUTS, layer_case
from mcore_moe.config import MoEConfig

from mcore_core import Component, Plugin, hookimpl
from mcore_core.config.kernel import kernel_config
from mcore_core.errors import UsageError
from mcore_core.manager import PluginManager
from mcore_core.model.moe.dispatchers import AllGather, AllToAll
from mcore_core.model.moe.find import find_dispatcher
from mcore_core.testing.cases import assert_same, run_case


class Doubled(AllToAll):
    """Sends twice what it is given and takes half of what comes back: no number changes."""

    calls = 0

    def token_dispatch(self, permutated_local_input_tokens, permuted_probs):
        type(self).calls += 1
        tokens, probs = super().token_dispatch(2 * permutated_local_input_tokens, permuted_probs)
        return tokens / 2, probs


class ThirdParty(Plugin):
    role = "support"

    @hookimpl
    def mcore_dispatchers(self):
        return [Component("doubled", f"{__name__}:Doubled", "through a wider pipe")]


def manager():
    found = PluginManager()
    found.load_installed()
    found.add_plugin("third", ThirdParty())
    return found


def named(name):
    config = kernel_config(MoEConfig, moe_token_dispatcher_type=name)
    return find_dispatcher(config, manager().catalogue("mcore_dispatchers"))


def test_found_by_name():
    assert named("allgather") is AllGather
    assert named("doubled").__name__ == "Doubled"
    with pytest.raises(UsageError, match=r"no dispatcher named 'alltoal'.*--moe_token_dispatcher"):
        named("alltoal")


@cache
def _reference():
    return run_case(layer_case("moe-softmax", steps=1), LAYOUTS["one"])


def test_a_third_party_dispatcher_trains():
    case = layer_case("moe-softmax", steps=1)
    found = named("doubled")
    run = run_case(dataclasses.replace(case, dispatcher=found), LAYOUTS["ep2"])
    assert_same(run, _reference(), relative=1e-5)
