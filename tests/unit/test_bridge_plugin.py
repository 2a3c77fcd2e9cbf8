"""The bridge as a plugin: light at start-up, its components load and satisfy the protocol."""

import inspect

from mcore_hfbridge.plugin import FAMILIES, BridgePlugin

from mcore_core.model.family import Family
from mcore_core.protocols import Bridge
from mcore_core.testing.contracts import PluginContract


class TestBridgePlugin(PluginContract):
    plugin = "bridge"


def test_components():
    plugin = BridgePlugin()
    families = {c.name: c.load() for c in plugin.mcore_model_specs()}
    assert list(families) == list(FAMILIES)
    for name, family in families.items():
        assert isinstance(family, Family)
        assert family.name == name
    bridge = plugin.mcore_build_bridge().load()
    for method in ("__init__", "load", "save", "export"):
        expected = inspect.signature(getattr(Bridge, method)).parameters
        found = inspect.signature(getattr(bridge, method)).parameters
        assert list(expected) == list(found), method
        assert [p.kind for p in expected.values()] == [p.kind for p in found.values()], method
