"""The option groups that every run has."""

from mcore_core.config.checkpoint import CheckpointConfig
from mcore_core.config.compose import RunConfig, compose
from mcore_core.config.data import DataConfig
from mcore_core.config.dataloader import DataLoaderConfig
from mcore_core.config.distributed import DistributedConfig
from mcore_core.config.evaluation import EvaluationConfig
from mcore_core.config.fp8 import FP8Config
from mcore_core.config.group import ConfigGroup
from mcore_core.config.learning_rate import LearningRateConfig
from mcore_core.config.logging import LoggingConfig
from mcore_core.config.mla import MLAConfig
from mcore_core.config.model import ModelConfig
from mcore_core.config.mtp import MTPConfig
from mcore_core.config.optimizer import OptimizerConfig
from mcore_core.config.precision import PrecisionConfig
from mcore_core.config.regularization import RegularizationConfig
from mcore_core.config.source import COMMAND_LINE, Source
from mcore_core.config.template import TemplateConfig
from mcore_core.config.train import TrainConfig
from mcore_core.config.tuner import FullTunerConfig, LoraConfig, TunerConfig
from mcore_core.config.weights import WeightsConfig

KERNEL = "kernel"
"""Stands where a plugin's name stands for the options of plugins."""

KERNEL_GROUPS: tuple[type[ConfigGroup], ...] = (
    WeightsConfig,
    DataConfig,
    TemplateConfig,
    TrainConfig,
    DataLoaderConfig,
    OptimizerConfig,
    LearningRateConfig,
    RegularizationConfig,
    EvaluationConfig,
    CheckpointConfig,
    LoggingConfig,
    DistributedConfig,
    PrecisionConfig,
    FP8Config,
    ModelConfig,
    MLAConfig,
    MTPConfig,
    TunerConfig,
    FullTunerConfig,
    LoraConfig,
)
"""In the order in which help shows them."""


def kernel_config(*extra: type[ConfigGroup], **values: object) -> RunConfig:
    """Return a config of the kernel's groups and `extra` ones, for tests and for use as a library.

    Raises UsageError like a command line with these options would.
    """
    groups = dict.fromkeys((*KERNEL_GROUPS, *extra), KERNEL)
    return compose(groups, [Source(COMMAND_LINE, values)])
