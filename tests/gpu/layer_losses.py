"""Train every decoder part for three steps on this machine's device: `layer_losses.py OUT [te]`.

Writes {name: {"losses": [...], "norms": [...]} or {"error": "..."}} as JSON. One rank; float32 with
our own layers, bfloat16 with Transformer Engine's.
"""

import dataclasses
import json
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests" / "parity")]


def losses(name: str, *, engine: bool) -> dict[str, object]:
    """Return what three steps of a shape gave."""
    from layer_cases import layer_case
    from megatron.core import parallel_state

    from mcore_core.parallel.topology import Layout
    from mcore_core.testing.cases import Session

    case = layer_case(name)
    case = dataclasses.replace(
        case, transformer_engine=engine, dtype="bfloat16" if engine else "float32"
    )
    try:
        results = Session(case, Layout()).train(len(case.steps))
    except Exception:
        return {"error": traceback.format_exc(limit=-4)}
    finally:
        parallel_state.destroy_model_parallel()
    return {"losses": [r.loss for r in results], "norms": [r.grad_norm for r in results]}


def main() -> None:
    """Run every shape."""
    from mcore_core import compat
    from mcore_core.platform import install

    install()
    compat.apply()
    from layer_cases import SHAPES

    engine = sys.argv[2:] == ["te"]
    found = {name: losses(name, engine=engine) for name in SHAPES}
    Path(sys.argv[1]).write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
