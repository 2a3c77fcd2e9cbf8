"""`mcore export --upcycle N`: a dense checkpoint as a mixture of experts; one process, no GPU."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mcore_core.config.checkpoint import CheckpointConfig
from mcore_core.config.export import ExportConfig
from mcore_core.config.train import TrainConfig
from mcore_core.config.weights import WeightsConfig
from mcore_core.errors import usage_error
from mcore_core.model.resolve import resolve_model_dir

if TYPE_CHECKING:
    from mcore_core.cli.prepared import PreparedExport

COPIES_OF_A_TOKEN = 2


def upcycle(prepared: "PreparedExport") -> int:
    """Write the model with experts; return the exit code."""
    config = prepared.config
    weights, options = config[WeightsConfig], config[ExportConfig]
    target = Path(config[CheckpointConfig].save or "").expanduser()
    if target.is_dir() and any(target.iterdir()) and not options.exist_ok:
        raise usage_error(
            "MC518",
            f"--save {target} is not empty",
            "fix: another folder, or --exist_ok to write into this one",
        )
    source = resolve_model_dir(
        weights.model or "",
        revision=weights.model_revision,
        use_hf=weights.use_hf,
        token=weights.hub_token,
    )
    component = prepared.manager.hook.mcore_build_bridge(config=config)
    bridge = None if component is None else component.load()
    if bridge is None or not hasattr(bridge, "upcycle"):
        raise usage_error(
            "MC516",
            "nothing here turns Hugging Face weights into experts",
            "fix: uv pip install mcore-hfbridge",
        )
    given = config.get("moe_router_topk") if "moe_router_topk" in config.names else None
    made = bridge.upcycle(
        source,
        target,
        copies=options.upcycle,
        granularity=options.moe_upcycling_granularity,
        topk=given or COPIES_OF_A_TOKEN,
        seed=config[TrainConfig].seed,
        max_shard_size=weights.max_shard_bytes,
    )
    sys.stdout.write(f"wrote {target}: {made}\n")
    return 0
