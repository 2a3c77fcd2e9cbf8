"""Which rows train and which validate."""

from typing import ClassVar, Literal

from pydantic import Field

from mcore_core.config.group import ConfigGroup


class DataConfig(ConfigGroup):
    """Which rows train and which validate."""

    title: ClassVar[str] = "Data"
    training: ClassVar[bool] = True

    dataset: list[str] = Field(default_factory=list)
    """Training data, one or several: a jsonl, json, csv or parquet file, a folder saved by
    datasets, a hub id, ref:subset#N for N rows of a subset, or scheme://path of a plugin."""
    val_dataset: list[str] = Field(default_factory=list)
    """Validation data, written as dataset."""
    split_dataset_ratio: float = Field(0.0, ge=0, lt=1)
    """Part of dataset to set aside for validation, 0 to 1, when there is no val_dataset."""
    data_seed: int = Field(42, ge=0)
    """Seed of sampling, splitting and shuffling."""
    dataset_num_proc: int = Field(1, ge=1)
    """Processes that tokenize the data before training."""
    load_from_cache_file: bool = False
    """Use tokenized data of an earlier run with the same content and options."""
    interleave_prob: list[float] | None = None
    """Draw from the datasets with these probabilities, in order, instead of joining them."""
    stopping_strategy: Literal["first_exhausted", "all_exhausted"] = "first_exhausted"
    """With interleave_prob: end when the first dataset is used up, or repeat it until all are."""
    shuffle_buffer_size: int = Field(1000, ge=1)
    """Rows from which streaming draws at random."""
    columns: dict[str, str] | None = None
    """The data's column names -> the fields they mean, as JSON:
    {"question": "query", "answer": "response"}."""
    strict: bool = False
    """Stop at a malformed row; false: drop it, count it and report the count."""
    remove_unused_columns: bool = True
    """Drop columns that the recipe does not read."""
