"""Derive options from each other where the meaning is clear, and say so in a note."""

from typing import Any

from mcore_core.config.compose import RunConfig

MINUTE = 60


def settle(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """Return the config with derived options filled in, and a note for what a user may not expect.

    Settling a second time changes nothing.
    """
    values: dict[str, Any] = {}
    notes: list[str] = []
    if config.get("sequence_parallel") and config.get("tensor_model_parallel_size") == 1:
        values["sequence_parallel"] = False
        notes.append("sequence_parallel is off: it needs tensor_model_parallel_size over 1")
    if config.changed("distributed_timeout_minutes") and not config.changed("ddp_timeout"):
        values["ddp_timeout"] = config.get("distributed_timeout_minutes") * MINUTE
    length = config.get("train_iters"), config.get("max_epochs")
    if length == (None, None) and not config.get("streaming"):
        values["max_epochs"] = 1
        notes.append("max_epochs is 1: neither train_iters nor max_epochs was given")
    if config.get("adapters") and not config.is_set("tuner_type"):
        values["tuner_type"] = "lora"
        notes.append("tuner_type is lora: --adapters was given")
    if config.get("recompute_granularity") == "full":
        if config.get("recompute_method") is None:
            values["recompute_method"] = "uniform"
        if config.get("recompute_num_layers") is None:
            values["recompute_num_layers"] = 1
    return (config.replace(**values) if values else config), notes
