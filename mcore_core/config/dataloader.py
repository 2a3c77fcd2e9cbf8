"""How samples are packed, shuffled, grouped and handed to the model."""

from typing import ClassVar, Literal

from pydantic import Field

from mcore_core.config.group import ConfigGroup, also


class DataLoaderConfig(ConfigGroup):
    """How samples are packed, shuffled, grouped and handed to the model."""

    title: ClassVar[str] = "Training"
    training: ClassVar[bool] = True

    packing: bool = False
    """Join short samples into rows of up to packing_length tokens, none of them cut."""
    packing_length: int | None = Field(None, ge=1)
    """Tokens of a packed row. none: max_length."""
    packing_num_proc: int = Field(1, ge=1)
    """Processes that decide which samples share a row."""
    streaming: bool = False
    """Read and tokenize rows while training, for data that is too large or endless; needs
    train_iters, or max_epochs where the data ends."""
    lazy_tokenize: bool | None = None
    """Tokenize each sample when it is needed, not all beforehand. none: beforehand."""
    dataset_shuffle: bool = True
    """Shuffle the rows of a dataset once, before it is used."""
    train_dataloader_shuffle: bool = True
    """Shuffle the training samples anew for each pass."""
    group_by_length: bool = False
    """Put samples of similar length into the same global batch, so that ranks wait less."""
    dataloader_type: Literal["single", "cyclic", "external"] = "cyclic"
    """cyclic: shuffled anew for each pass; single: always in the order of the data."""
    no_data_sharding: bool = False
    """Megatron's switch to draw from all samples rather than from a rank's own part. Here every
    batch is drawn from all samples, and is the same whatever the layout."""
    num_workers: int = Field(4, ge=0, json_schema_extra=also("dataloader_num_workers"))
    """Processes that prepare batches on each rank; 0: the training process itself."""
    dataloader_pin_memory: bool = True
    """Prepare batches in memory from which copying to a GPU is fast."""
    dataloader_persistent_workers: bool = True
    """Keep the workers alive between passes over the data."""
    dataloader_prefetch_factor: int = Field(2, ge=1)
    """Batches that each worker prepares in advance."""
