"""The models beside the policy that a recipe asks for, in the policy's layout; none trains."""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mcore_core.checkpoint import folders as checkpoints
from mcore_core.checkpoint.load import load
from mcore_core.checkpoint.state import Trainable
from mcore_core.config.checkpoint import CheckpointConfig
from mcore_core.config.layout_rules import check_model, split_options
from mcore_core.config.source import read_yaml
from mcore_core.config.tuner import LoraConfig
from mcore_core.config.weights import WeightsConfig
from mcore_core.errors import Problem, UsageError, usage_error
from mcore_core.model.names import unwrap
from mcore_core.model.resolve import read_hf_config, resolve_family, resolve_model_dir
from mcore_core.parallel.stages import layers_per_stage
from mcore_core.protocols import FrozenModel, TunerContext
from mcore_core.train.build import build_model, model_plan
from mcore_core.train.grow import load_weights
from mcore_core.train.offload import HostWeights
from mcore_core.train.plan import ModelSource
from mcore_core.train.scoring import ScoredModel
from mcore_core.train.tuning import build_tuner

if TYPE_CHECKING:
    from mcore_core.component import Catalogue
    from mcore_core.config.compose import RunConfig
    from mcore_core.manager import PluginManager
    from mcore_core.model.build import ModelPlan
    from mcore_core.platform.base import Platform
    from mcore_core.protocols import Tuner


def frozen_source(
    name: str,
    wanted: FrozenModel,
    policy: ModelSource,
    config: "RunConfig",
    manager: "PluginManager",
) -> ModelSource:
    """Return what a frozen model is made from; another folder is read without the Model overrides.

    Raises:
        UsageError: The folder, its layout or its vocabulary does not fit.
    """
    if wanted.offload and not torch.cuda.is_available():
        raise usage_error(
            "MC371",
            f"{name}: without a GPU its weights are in host memory anyway",
            f"fix: leave out --offload_{name}_model",
        )
    if wanted.model is None:
        return policy
    weights = config[WeightsConfig]
    path = resolve_model_dir(
        wanted.model,
        revision=wanted.revision,
        use_hf=weights.use_hf,
        token=weights.hub_token,
        option=f"{name}:",
    )
    hf_config = read_hf_config(path)
    family = resolve_family(hf_config, manager.catalogue("mcore_model_specs"), wanted.model_type)
    architecture = family.architecture(hf_config)
    have, want = architecture.vocab_size, policy.architecture.vocab_size
    if have != want and not wanted.own_vocabulary:
        raise usage_error(
            "MC519",
            f"{name}: {path} has a vocabulary of {have} tokens, the policy of {want}",
            "log-probabilities of one model's tokens mean nothing under another's vocabulary",
            "fix: name the model that the policy was made from",
        )
    if problems := check_model(config, architecture, policy.layout):
        raise UsageError(problems)
    counts = layers_per_stage(architecture.num_layers, split_options(config, policy.layout))
    return ModelSource(
        path=path,
        hf_config=hf_config,
        family=family,
        architecture=architecture,
        layout=policy.layout,
        stage_layers=tuple(counts),
    )


def largest_vocabulary(
    wanted: Mapping[str, FrozenModel],
    policy: ModelSource,
    config: "RunConfig",
    manager: "PluginManager",
) -> int:
    """Return the rows of the largest vocabulary among the policy's and those of frozen models.

    Raises:
        UsageError: A folder, its layout or its vocabulary does not fit.
    """
    sources = [frozen_source(name, w, policy, config, manager) for name, w in wanted.items()]
    return max(source.architecture.vocab_size for source in (policy, *sources))


def build_frozen(
    wanted: Mapping[str, FrozenModel],
    policy: ModelSource,
    config: "RunConfig",
    manager: "PluginManager",
    platform: "Platform",
    *,
    bridge_class: Any,  # noqa: ANN401
    plan: "ModelPlan",
    adapters: bool = False,
) -> dict[str, ScoredModel]:
    """Build and load every model; collective.

    With `adapters` the policy trains adapters only: a model that is the policy as it started is
    left out, since the policy with its adapters off is that. `plan` is the policy's.

    Raises:
        UsageError: What the user has to change.
    """
    return {
        name: _build(
            name,
            frozen_source(name, each, policy, config, manager),
            each,
            config,
            platform,
            bridge_class=bridge_class,
            tuners=manager.catalogue("mcore_tuners"),
            policy=plan,
        )
        for name, each in wanted.items()
        if not (adapters and each == FrozenModel())
    }


def _build(
    name: str,
    source: ModelSource,
    wanted: FrozenModel,
    config: "RunConfig",
    platform: "Platform",
    *,
    bridge_class: Any,  # noqa: ANN401
    tuners: "Catalogue[Any]",
    policy: "ModelPlan",
) -> ScoredModel:
    plan = model_plan(
        source,
        config,
        platform,
        max_length=policy.max_length,
        dispatcher=policy.dispatcher,
        least_vocab=policy.padded_vocab_size,
    )
    chunks = build_model(plan, config, on_cpu=platform.name == "cpu", initialize=False)
    bridge = bridge_class(source.family, source.architecture)
    with _options_of(name):
        tuner = _adapters(wanted, source, config, tuners, bridge)
    if tuner is not None:
        tuner.apply(chunks)
    if wanted.load is None:
        load_weights(chunks, source, bridge_class)
    else:
        found = checkpoints.require(Path(wanted.load).expanduser())
        only_weights = {"no_load_optim": True, "no_load_rng": True, "finetune": True}
        options = config[CheckpointConfig].model_copy(update=only_weights)
        load(Trainable(chunks, None, source.layout), found, options)
    if tuner is not None:
        with _options_of(name):
            tuner.load(chunks)
    model = freeze(chunks, plan)
    if not wanted.offload:
        return model
    return dataclasses.replace(model, host=HostWeights(chunks, platform.device()))


def _adapters(
    wanted: FrozenModel,
    source: ModelSource,
    config: "RunConfig",
    tuners: "Catalogue[Any]",
    bridge: Any,  # noqa: ANN401
) -> "Tuner | None":
    """Return what puts a frozen model's adapters beside its weights, where it has any.

    The policy's own adapter options say nothing about them. Of a run its adapter in PEFT's format
    is taken, or where it was saved without one what its options and its state say.
    """
    config = config.without(*LoraConfig.model_fields, "adapters")
    options: dict[str, Any]
    if wanted.adapters:
        options = {"adapters": list(wanted.adapters)}
    elif wanted.adapter_load is not None:
        found = checkpoints.require(Path(wanted.adapter_load).expanduser())
        if (found.path / checkpoints.ADAPTER).is_file():
            options = {"adapters": [str(found.path)]}
        else:
            given = read_yaml(str(found.path / "run.yaml")).values
            options = {n: given[n] for n in LoraConfig.model_fields if n in given}
            options["adapter_load"] = str(found.path)
    else:
        return None
    asked = config.replace(**options, model=str(source.path), tuner_type="lora", merge_lora=None)
    context = TunerContext(
        config=asked, family=source.family, architecture=source.architecture, bridge=bridge
    )
    return build_tuner(tuners, context)


@contextmanager
def _options_of(name: str) -> Iterator[None]:
    """Name the options that a frozen model's adapters were given by, not the policy's."""
    try:
        yield
    except UsageError as error:
        own = re.compile(r"--(model|adapters|adapter_load)\b")
        raise UsageError(
            [
                Problem(
                    p.code,
                    own.sub(rf"--{name}_\1", p.message),
                    [own.sub(rf"--{name}_\1", note) for note in p.notes],
                )
                for p in error.problems
            ]
        ) from error


def check_movable(moved: Mapping[str, list[Any]], policy: list[Any]) -> None:
    """Raise UsageError where a model that is to follow the policy has other tensors.

    Args:
        moved: The chunks of each model, by name.
        policy: The policy's chunks.
    """
    want = [_shapes(chunk) for chunk in policy]
    for name, chunks in moved.items():
        have = [_shapes(chunk) for chunk in chunks]
        for mine, theirs in zip(have, want, strict=True):
            differ = {key for key, _ in mine.items() ^ theirs.items()}
            if differ:
                key = min(differ)
                raise usage_error(
                    "MC358",
                    f"{name}: its weights cannot follow the policy's, which have other shapes",
                    f"{key}: {mine.get(key, 'none')}, in the policy {theirs.get(key, 'none')}",
                    f"fix: --{name}_model with a model of the policy's shape",
                )


def _shapes(chunk: Any) -> dict[str, tuple[int, ...]]:  # noqa: ANN401
    return {name: tuple(weight.shape) for name, weight in unwrap(chunk).named_parameters()}


def freeze(chunks: list[Any], plan: Any) -> ScoredModel:  # noqa: ANN401
    """Return the chunks in eval mode, without gradients."""
    for chunk in chunks:
        chunk.requires_grad_(False)
        chunk.eval()
    return ScoredModel(chunks=chunks, plan=plan)
