"""Which request is in which slot, and what each has generated: arrays on the host, a row a slot.

The slots in use are always the first ones: a step runs over a prefix of them, and what finishes is
overwritten by the last.

Shapes: N slots in use, n some of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mcore_core.protocols import Completion, Request
from mcore_rlhf.rollout.native.sample import stream_key

if TYPE_CHECKING:
    from numpy.typing import NDArray

type Ints = "NDArray[np.int64]"


@dataclass(frozen=True, slots=True)
class Pending:
    """A request that is not done, with what was generated for it so far."""

    request: Request
    stops: tuple[int, ...]
    """Tokens that end it."""
    tokens: tuple[int, ...] = ()
    logps: tuple[float, ...] = ()
    versions: tuple[int, ...] = ()
    routing: "NDArray[np.int16] | None" = None
    """Experts of the tokens that were read, [prompt and completion, layers, K]; -1: not read."""

    @property
    def prompt(self) -> tuple[int, ...]:
        """What the model reads before it goes on."""
        return self.request.token_ids + self.tokens

    @property
    def room(self) -> int:
        """Tokens that prompt and whole completion can take."""
        return len(self.request.token_ids) + self.request.sampling.max_tokens

    def completion(self, stop: Literal["stop", "length", "cancelled"]) -> Completion:
        """Return what was generated as it is given back."""
        return Completion(
            id=self.request.id,
            token_ids=self.tokens,
            logps=np.asarray(self.logps, np.float32),
            versions=np.asarray(self.versions, np.int64),
            stop=stop,
            trainable=np.ones(len(self.tokens), np.bool_),
            routing=self.routing,
        )


class Slots:
    """The requests in use and their progress."""

    def __init__(self) -> None:
        self.pending: list[Pending] = []
        self.last = np.zeros(0, np.int64)
        """The token that each slot generated last, which is not in its keys and values yet."""
        self.position = np.zeros(0, np.int64)
        """Position of that token."""
        self.count = np.zeros(0, np.int64)
        """Tokens generated."""
        self.limit = np.zeros(0, np.int64)
        self.keys = np.zeros(0, np.uint64)
        """Where the random numbers of each begin."""
        self.stops = np.full((0, 1), -1, np.int64)
        """Tokens that end each, filled up with -1."""
        self.words = np.zeros(0, np.bool_)
        """Whether each may also end with a string."""
        self.tokens = np.zeros((0, 1), np.int64)
        self.logps = np.zeros((0, 1), np.float32)
        self.versions = np.zeros((0, 1), np.int64)
        self.routing: list[NDArray[np.int16] | None] = []
        """Experts of each slot's tokens, where they are recorded: [room, layers, K]."""

    _ARRAYS = (
        "last",
        "position",
        "count",
        "limit",
        "keys",
        "stops",
        "words",
        "tokens",
        "logps",
        "versions",
    )

    def __len__(self) -> int:
        return len(self.pending)

    def _fit(self, slots: int, stops: int, tokens: int) -> None:
        """Make the arrays at least so large."""
        wanted = {"stops": stops, "tokens": tokens, "logps": tokens, "versions": tokens}
        for name in self._ARRAYS:
            array = getattr(self, name)
            more = [(0, max(0, slots - len(array)))]
            if name in wanted:
                more.append((0, max(0, wanted[name] - array.shape[1])))
            if any(n for _, n in more):
                fill: Any = -1 if name == "stops" else 0
                setattr(self, name, np.pad(array, more, constant_values=fill))

    def add(self, several: Sequence[Pending], *, multiple: int = 1) -> Ints:
        """Put requests into the next slots; return which.

        The arrays get a multiple of `multiple` rows: a step may run over that many.
        """
        first = len(self.pending)
        slots = -(-(first + len(several)) // multiple) * multiple
        self._fit(
            slots,
            max(len(p.stops) for p in several),
            max(p.request.sampling.max_tokens for p in several),
        )
        for slot, one in enumerate(several, start=first):
            done, sampling = len(one.tokens), one.request.sampling
            self.count[slot], self.limit[slot] = done, sampling.max_tokens
            self.position[slot] = len(one.prompt) - 1
            self.keys[slot] = stream_key(sampling.seed, one.request.id)
            self.words[slot] = bool(sampling.stop)
            self.stops[slot] = -1
            self.stops[slot, : len(one.stops)] = one.stops
            self.tokens[slot, :done] = one.tokens
            self.logps[slot, :done] = one.logps
            self.versions[slot, :done] = one.versions
        self.pending.extend(several)
        self.routing += [None] * len(several)
        return np.arange(first, len(self.pending))

    def record(self, where_n: Ints, tokens_n: Ints, logps_n: Any, version: int) -> None:  # noqa: ANN401
        """Note the next token of some slots."""
        at = self.count[where_n]
        self.tokens[where_n, at] = tokens_n
        self.logps[where_n, at] = logps_n
        self.versions[where_n, at] = version
        self.last[where_n] = tokens_n
        self.count[where_n] += 1
        self.position[where_n] += 1

    def note_prompt(self, slot: int, routing_TLK: "NDArray[np.int16]") -> None:
        """Note the experts of the tokens that were read first."""
        room = np.full((self.pending[slot].room, *routing_TLK.shape[1:]), -1, np.int16)
        room[: len(routing_TLK)] = routing_TLK
        self.routing[slot] = room

    def note_step(self, positions_N: Ints, routing_NLK: "NDArray[np.int16]") -> None:
        """Note the experts of the token that each slot read at a position."""
        for slot, (position, experts) in enumerate(zip(positions_N, routing_NLK, strict=True)):
            room = self.routing[slot]
            assert room is not None
            room[position] = experts

    def progress(self, slot: int) -> Pending:
        """Return a slot's request with what it has generated."""
        one, n = self.pending[slot], int(self.count[slot])
        routing = self.routing[slot]
        if routing is not None:
            routing = routing[: len(one.request.token_ids) + n]
        return Pending(
            one.request,
            one.stops,
            tuple(self.tokens[slot, :n].tolist()),
            tuple(self.logps[slot, :n].tolist()),
            tuple(self.versions[slot, :n].tolist()),
            routing,
        )

    def remove(self, where_n: Ints) -> tuple[Ints, Ints]:
        """Free slots; return (source, target): what moved where so that the others stay first."""
        total = len(self.pending)
        left = total - len(where_n)
        gone = np.zeros(total, np.bool_)
        gone[where_n] = True
        target = np.flatnonzero(gone[:left])
        source = left + np.flatnonzero(~gone[left:])
        for name in self._ARRAYS:
            array = getattr(self, name)
            array[target] = array[source]
        self.position[left:total] = 0
        for a, b in zip(source.tolist(), target.tolist(), strict=True):
            self.pending[b], self.routing[b] = self.pending[a], self.routing[a]
        del self.pending[left:], self.routing[left:]
        return source, target
