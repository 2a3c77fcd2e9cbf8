"""What followed a prompt: the model's turns and, between them, those of tools and environments.

L tokens after the prompt.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mcore_core.protocols import Completion


@dataclass(slots=True)
class Trajectory:
    """One completion of one prompt; it grows by turns."""

    index: int
    """Its number in the round: prompts in order, each one's completions side by side."""
    token_ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    """The policy step of each token; -1 where the model did not write it."""
    trains: list[bool] = field(default_factory=list)
    messages: list[dict[str, Any]] = field(default_factory=list)
    """What was said after the prompt."""
    turns: int = 0
    routing: NDArray[np.int16] | None = None
    """Experts of the prompt's tokens and of these, as the engine read them for the last turn."""
    finished: bool = False
    """False where it was cut by its length."""

    @property
    def text(self) -> str:
        """The last turn of the model."""
        said = [m["content"] for m in self.messages if m["role"] == "assistant"]
        return said[-1] if said else ""

    def wrote(self, completion: Completion, text: str) -> None:
        """Add a turn of the model."""
        self.token_ids += completion.token_ids
        self.logps += completion.logps.tolist()
        self.versions += completion.versions.tolist()
        self.trains += completion.trainable.tolist()
        self.routing = completion.routing
        self.messages.append({"role": "assistant", "content": text})
        self.turns += 1
        self.finished = completion.stop == "stop"

    def heard(self, token_ids: list[int], messages: list[dict[str, Any]]) -> None:
        """Add what a tool or an environment said: it is read, and never trained."""
        self.token_ids += token_ids
        self.logps += [0.0] * len(token_ids)
        self.versions += [-1] * len(token_ids)
        self.trains += [False] * len(token_ids)
        self.messages += messages

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return `token_ids` int32, `rollout` float32, `versions` int64 and `trains`, all [L]."""
        return {
            "token_ids": np.asarray(self.token_ids, np.int32),
            "rollout": np.asarray(self.logps, np.float32),
            "versions": np.asarray(self.versions, np.int64),
            "trains": np.asarray(self.trains, bool),
        }
