"""No option is silently ignored: code outside the option groups reads it, or it is refused."""

import re
from importlib.metadata import entry_points
from pathlib import Path

from mcore_core.config.export import ExportConfig
from mcore_core.config.kernel import KERNEL_GROUPS
from mcore_core.config.refused import REFUSED

ROOT = Path(__file__).parents[2]
DECLARATIONS = {"settle.py", "layout_rules.py", "weights.py", "precision.py"}
"""The files of mcore_core/config that act on options rather than declare or check them."""
ONLY_CHOICE = {"ckpt_format"}
"""There is one value, and it is what the kernel does."""
NEEDS_ITS_SWITCH = {"cross_entropy_fusion_impl"}
"""Means nothing without another option, which is refused."""


def test_every_option_is_read_or_refused() -> None:
    files = [*ROOT.glob("mcore_core/**/*.py"), *ROOT.glob("plugins/*/*/**/*.py")]
    code = "\n".join(
        path.read_text(encoding="utf-8")
        for path in files
        if path.parent.name != "config" or path.name in DECLARATIONS
    )
    read = set(re.findall(r"\.([a-z0-9_]+)\b", code)) | set(re.findall(r"[\"']([a-z0-9_]+)", code))
    options = {n for group in (*KERNEL_GROUPS, ExportConfig) for n in group.model_fields}
    unread = options - read - set(REFUSED) - ONLY_CHOICE - NEEDS_ITS_SWITCH
    assert sorted(unread) == []


def test_every_option_of_a_plugin_is_read() -> None:
    """By other code than where it is declared, or through `self` there."""
    groups = {
        group
        for plugin in entry_points(group="mcore.plugins")
        for group in getattr(plugin.load()(), "mcore_config_groups", list)()
    }
    assert len(groups) > 10
    code = ""
    for path in [*ROOT.glob("mcore_core/**/*.py"), *ROOT.glob("plugins/*/*/**/*.py")]:
        text = path.read_text(encoding="utf-8")
        declares = "(ConfigGroup)" in text
        code += "\n".join(re.findall(r"self\.\w+", text)) if declares else text
    read = set(re.findall(r"\.([a-z0-9_]+)\b", code)) | set(re.findall(r"[\"']([a-z0-9_]+)", code))
    unread = {name for group in groups for name in group.model_fields} - read
    assert sorted(unread) == []
