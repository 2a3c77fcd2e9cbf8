"""What goes over the wire between a training run and a vLLM server; see inside/mcore_vllm_gate.py.

L tokens of a completion.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from mcore_core.protocols import Completion, Request

PROTOCOL = 1
SEED_BYTES = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What a server says of itself."""

    protocol: int
    boot: str
    """Drawn when it started."""
    host: str
    owner: str
    """The run whose weights it has; empty: it has those of its start."""
    version: int
    """The policy step of its weights; -1: those of its start, or none are whole."""
    vllm: str
    model: str
    vocab_size: int
    max_model_len: int
    dtype: str
    logps: str
    """"tempered": under the temperature; "raw": as at temperature 1."""
    max_lora_rank: int | None

    @classmethod
    def read(cls, answer: Mapping[str, Any]) -> Self:
        """Read GET /mcore/state. Raises KeyError where it is no such answer."""
        return cls(**{name: answer[name] for name in cls.__dataclass_fields__})


def asked(request: Request, *, with_row: bool) -> dict[str, Any]:
    """Return a request as JSON."""
    s = request.sampling
    found: dict[str, Any] = {
        "id": request.id,
        "prompt": list(request.token_ids),
        "sampling": {
            "max_tokens": s.max_tokens,
            "temperature": s.temperature,
            "top_p": s.top_p,
            "top_k": max(0, s.top_k),
            "repetition_penalty": s.repetition_penalty,
            "stop": list(s.stop),
            "stop_token_ids": list(s.stop_token_ids),
            "seed": seed_of(s.seed, request.id),
        },
    }
    if with_row:
        found["row"] = json.loads(json.dumps(dict(request.row), default=str))
    return found


def parameters(request: Request) -> dict[str, Any]:
    """Return a request's sampling as vLLM's SamplingParams in this process take it."""
    return {
        **asked(request, with_row=False)["sampling"],
        "logprobs": 0,
        "ignore_eos": True,
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
    }


def seed_of(seed: int, key: str) -> int:
    """Return a seed of the run's and the request's own."""
    digest = hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=SEED_BYTES).digest()
    return int.from_bytes(digest, "little")


def completion(
    line: Mapping[str, Any], request: Request, decode: Callable[[Sequence[int]], str]
) -> Completion:
    """Read a line of /mcore/generate.

    Args:
        line: The line.
        request: What it answers.
        decode: Turns tokens into text, special ones included.

    Raises:
        ValueError: Tokens, log-probabilities and versions are not of one length.
    """
    tokens, logps = [int(t) for t in line["tokens"]], np.asarray(line["logps"], np.float32)
    versions = np.repeat(
        np.asarray([v for v, _ in line["versions"]], np.int64), [n for _, n in line["versions"]]
    )
    if not len(tokens) == len(logps) == len(versions) or not np.isfinite(logps).all():
        raise ValueError(
            f"{len(tokens)} tokens, {len(logps)} log-probabilities, {len(versions)} versions"
        )
    length, stop = len(tokens), line["stop"]
    if request.sampling.stop and len(line["versions"]) > 1:
        length = first_stop(tokens, request.sampling.stop, decode)
        if length < len(tokens):
            stop = "stop"
    return Completion(
        id=request.id,
        token_ids=tuple(tokens[:length]),
        logps=logps[:length],
        versions=versions[:length],
        stop=stop,
        trainable=np.ones(length, np.bool_),
    )


def first_stop(
    tokens: Sequence[int], stops: Sequence[str], decode: Callable[[Sequence[int]], str]
) -> int:
    """Return how many tokens there are up to the one that completes a stop string.

    vLLM looks for them itself, but not across the place where new weights came.
    """
    if not any(s in decode(tokens) for s in stops):
        return len(tokens)
    low, high = 1, len(tokens)
    while low < high:
        middle = (low + high) // 2
        if any(s in decode(tokens[:middle]) for s in stops):
            high = middle
        else:
            low = middle + 1
    return low


def nothing(request: Request, stop: Any) -> Completion:  # noqa: ANN401
    """Return a completion without tokens."""
    return Completion(
        id=request.id,
        token_ids=(),
        logps=np.zeros(0, np.float32),
        versions=np.zeros(0, np.int64),
        stop=stop,
        trainable=np.zeros(0, np.bool_),
    )
