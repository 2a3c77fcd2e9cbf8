"""From the options and the model's config.json to what is built; torch-free.

`ModelSource` is what a launcher checks before it starts ranks.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcore_core.config.layout_rules import check_model, layout_of, split_options
from mcore_core.config.weights import WeightsConfig
from mcore_core.errors import UsageError
from mcore_core.model.hf_head import read_head, with_head
from mcore_core.model.overrides import override
from mcore_core.model.resolve import read_hf_config, resolve_family, resolve_model_dir
from mcore_core.parallel.stages import layers_per_stage

if TYPE_CHECKING:
    from mcore_core.config.compose import RunConfig
    from mcore_core.data.new_tokens import Growth
    from mcore_core.manager import PluginManager
    from mcore_core.model.architecture import Architecture
    from mcore_core.model.family import Family
    from mcore_core.parallel.topology import Layout
    from mcore_core.protocols import HeadSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """The model that a run starts from."""

    path: Path
    hf_config: Mapping[str, Any]
    family: "Family"
    architecture: "Architecture"
    layout: "Layout"
    stage_layers: tuple[int, ...]
    growth: "Growth | None" = None
    """How the vocabulary grows beyond that of the files."""

    @property
    def in_files(self) -> "Architecture":
        """The architecture of what the files hold."""
        if self.growth is None:
            return self.architecture
        return replace(self.architecture, vocab_size=self.growth.file_rows)

    def grown(self, growth: "Growth | None") -> "ModelSource":
        """Return the source of a model with more tokens than its files have."""
        if growth is None:
            return self
        architecture = replace(self.architecture, vocab_size=growth.rows)
        return replace(self, architecture=architecture, growth=growth)

    @property
    def name(self) -> str:
        """What to call the model in reports."""
        return self.path.name

    def with_head(self, spec: "HeadSpec") -> "ModelSource":
        """Return the source of the same model with the head that a recipe asks for.

        Raises:
            UsageError: The checkpoint's head cannot be that one.
        """
        return replace(self, architecture=with_head(self.architecture, spec, self.hf_config))


def model_source(config: "RunConfig", manager: "PluginManager", world_size: int) -> ModelSource:
    """Read the model's config and check it against the options and the layout.

    Raises:
        UsageError: Every problem found.
    """
    weights = config[WeightsConfig]
    assert weights.model is not None, "check_options requires --model"
    path = resolve_model_dir(
        weights.model,
        revision=weights.model_revision,
        use_hf=weights.use_hf,
        token=weights.hub_token,
    )
    hf_config = read_hf_config(path)
    family = resolve_family(hf_config, manager.catalogue("mcore_model_specs"), weights.model_type)
    architecture = override(read_head(family.architecture(hf_config), hf_config), config)
    layout = layout_of(config, world_size, num_layers=architecture.num_layers)
    if problems := check_model(config, architecture, layout):
        raise UsageError(problems)
    counts = layers_per_stage(architecture.num_layers, split_options(config, layout))
    return ModelSource(
        path=path,
        hf_config=hf_config,
        family=family,
        architecture=architecture,
        layout=layout,
        stage_layers=tuple(counts),
    )
