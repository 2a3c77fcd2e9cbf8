"""The `tuners` plugin."""

from collections.abc import Iterable
from typing import ClassVar, Literal

from mcore_core import Component, Plugin, hookimpl
from mcore_core.protocols import Tuner


class TunersPlugin(Plugin):
    """What trains: all parameters, some of them, or adapters."""

    role: ClassVar[Literal["recipe", "support"]] = "support"
    summary: ClassVar[str] = "which parameters train: all, some, or LoRA adapters"

    @hookimpl
    def mcore_tuners(self) -> Iterable[Component[Tuner]]:
        """Return the tuners."""
        module = "mcore_sft.tuners"
        yield Component("full", f"{module}.full:Full", "the model's own weights train")
        yield Component("lora", f"{module}.lora.tuner:Lora", "adapters train, as PEFT has them")
