"""The servers of a run: requests wait in a thread of their own, and outlive a server that goes.

A batch goes to one server, which sends a line for each completion as it is done. What a server has
not answered when it goes away is asked of another, or of the same one when it is there again with
the run's weights.
"""

import asyncio
import json
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import httpx

from mcore_core.errors import Problem, UsageError
from mcore_core.failure import RunFailure
from mcore_rlhf.rollout.vllm import wire

if TYPE_CHECKING:
    from mcore_core.protocols import Completion, Request

PAUSE = 0.5
"""Seconds between two attempts."""
SILENCE = 30.0
"""Seconds without a byte, of a server that sends one every five, after which it counts as gone."""
STATE_TIMEOUT = 10.0


@dataclass(slots=True)
class Server:
    """An address, and what is known of the server there."""

    url: str
    alive: bool = True
    busy: int = 0
    """Requests that it has."""


@dataclass(slots=True)
class Batch:
    """Requests that go to one server together."""

    left: "dict[str, Request]"
    """Those without an answer."""
    since: float | None = None
    """When it began to wait for a server."""
    said: bool = False


@dataclass(slots=True)
class Policy:
    """Which weights the servers are to answer with."""

    owner: str
    version: int = -1


@dataclass(slots=True)
class _Inbox:
    items: "queue.Queue[Completion | BaseException]" = field(default_factory=queue.Queue)
    cancelled: set[str] = field(default_factory=set)


class Fleet:
    """Speaks with the servers.

    Args:
        urls: Their addresses.
        timeout: Seconds to wait for one to be there.
        policy: Kept up to date by the owner.
        decode: Turns tokens into text.
        with_rows: Send the dataset's rows along.
        warn: Tells the user something.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        timeout: float,
        policy: Policy,
        decode: Callable[[Sequence[int]], str],
        with_rows: bool = False,
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.servers = [Server(url) for url in urls]
        self.timeout, self.policy = timeout, policy
        self._decode, self._with_rows, self._warn = decode, with_rows, warn
        self._inbox = _Inbox()
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._client = httpx.AsyncClient(
            timeout=httpx.Timeout(SILENCE, connect=STATE_TIMEOUT, pool=None),
            limits=httpx.Limits(max_connections=None),
            trust_env=False,
        )

    def submit(self, requests: "Sequence[Request]") -> None:
        """Ask the servers, each for a part."""
        asks = []
        for request in requests:
            if request.sampling.max_tokens <= 0:
                self._inbox.items.put(wire.nothing(request, "length"))
            else:
                asks.append(request)
        there = [s for s in self.servers if s.alive] or self.servers
        there.sort(key=lambda s: s.busy)
        for i, server in enumerate(there):
            part = asks[i * len(asks) // len(there) : (i + 1) * len(asks) // len(there)]
            if part:
                batch = Batch({request.id: request for request in part})
                asyncio.run_coroutine_threadsafe(self._answer(batch, server), self._loop)

    def collect(self, *, wait: bool) -> "list[Completion]":
        """Return what is done. With `wait` at least one: something must be pending.

        Raises:
            RunFailure: The servers stay away, or refuse.
        """
        items = [self._inbox.items.get()] if wait else []
        while True:
            try:
                items.append(self._inbox.items.get_nowait())
            except queue.Empty:
                break
        found = []
        for item in items:
            if isinstance(item, BaseException):
                raise item
            found.append(item)
        return found

    def cancel(self, ids: Sequence[str]) -> None:
        """Have requests end with what they have."""
        self._inbox.cancelled |= set(ids)
        asyncio.run_coroutine_threadsafe(self._cancel(list(ids)), self._loop)

    def close(self) -> None:
        """Stop asking."""
        self._closed = True

        async def end() -> None:
            for task in asyncio.all_tasks():
                if task is not asyncio.current_task():
                    task.cancel()
            await self._client.aclose()
            self._loop.stop()

        asyncio.run_coroutine_threadsafe(end(), self._loop)
        self._thread.join(timeout=5)

    # -- in the thread -----------------------------------------------------------------------------

    async def _cancel(self, ids: list[str]) -> None:
        for server in self.servers:
            if server.alive and server.busy:
                try:
                    await self._client.post(f"{server.url}/mcore/cancel", json={"ids": ids})
                except httpx.HTTPError:
                    continue

    async def _answer(self, batch: Batch, server: Server) -> None:
        """See to it that every request of a batch is answered."""
        try:
            while batch.left:
                self._drop_cancelled(batch)
                if not batch.left:
                    return
                if not server.alive:
                    server = await self._another(batch)
                lost = await self._ask(batch, server)
                if lost is not None:
                    server.alive = False
                    self._say(batch, server, lost)
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            self._inbox.items.put(error)

    def _drop_cancelled(self, batch: Batch) -> None:
        for key in [key for key in batch.left if key in self._inbox.cancelled]:
            self._put(wire.nothing(batch.left.pop(key), "cancelled"))

    def _put(self, completion: "Completion") -> None:
        self._inbox.cancelled.discard(completion.id)
        self._inbox.items.put(completion)

    async def _ask(self, batch: Batch, server: Server) -> str | None:
        """Ask for what is left; return why the server did not answer all, if so."""
        number = len(batch.left)
        server.busy += number
        content = {
            "owner": self.policy.owner,
            "version": self.policy.version,
            "requests": [wire.asked(r, with_row=self._with_rows) for r in batch.left.values()],
        }
        try:
            async with self._client.stream(
                "POST", f"{server.url}/mcore/generate", json=content
            ) as answer:
                if answer.status_code != httpx.codes.OK:
                    await answer.aread()
                    return f"HTTP {answer.status_code}: {answer.text[:200]}"
                batch.since, batch.said = None, False
                async for line in answer.aiter_lines():
                    if line.strip():
                        self._take(batch, json.loads(line), server)
        except (httpx.TransportError, httpx.StreamError, ValueError) as error:
            return f"{type(error).__name__}: {error}".rstrip(": ")
        finally:
            server.busy -= number
        return "it ended the connection" if batch.left else None

    def _take(self, batch: Batch, line: dict[str, Any], server: Server) -> None:
        if "error" in line:
            raise RunFailure(
                "MC845",
                f"the vLLM server at {server.url} cannot generate request {line['id']}",
                line["error"],
                "its log says more",
            )
        request = batch.left.pop(line["id"])
        self._put(wire.completion(line, request, self._decode))

    async def _another(self, batch: Batch) -> Server:
        """Wait for a server that has the run's weights.

        Raises:
            RunFailure: None is there in time.
        """
        batch.since = batch.since or time.monotonic()
        seen: list[str] = []
        while time.monotonic() - batch.since < self.timeout:
            seen = []
            for server in sorted(self.servers, key=lambda s: s.busy):
                found = await self._state(server)
                if isinstance(found, str):
                    seen.append(f"{server.url}: {found}")
                elif (found.owner, found.version) == (self.policy.owner, self.policy.version):
                    server.alive = True
                    return server
                else:
                    seen.append(f"{server.url}: it has no weights of this step yet")
            await asyncio.sleep(PAUSE)
        raise RunFailure(
            "MC844",
            f"no vLLM server was there for {self.timeout:g} s (--vllm_server_timeout)",
            *seen,
            "fix: start it with `mcore rollout`, then go on from the last checkpoint with --load",
        )

    async def _state(self, server: Server) -> wire.State | str:
        try:
            answer = await self._client.get(f"{server.url}/mcore/state", timeout=STATE_TIMEOUT)
            answer.raise_for_status()
            return wire.State.read(answer.json())
        except (httpx.HTTPError, ValueError, KeyError) as error:
            return f"{type(error).__name__}: {error}".rstrip(": ")

    def _say(self, batch: Batch, server: Server, why: str) -> None:
        if not batch.said and not self._closed:
            batch.said = True
            others = any(s.alive for s in self.servers)
            goes = "another server has them now" if others else "they wait until it is there again"
            self._warn(
                f"the vLLM server at {server.url} left {len(batch.left)} requests without an "
                f"answer ({why}); {goes} (for {self.timeout:g} s at most: --vllm_server_timeout)"
            )


def connect(urls: Sequence[str], timeout: float) -> list[wire.State]:
    """Wait until every server answers; return what they say.

    Raises:
        UsageError: Naming each that does not, or that `mcore rollout` did not start.
    """
    end = time.monotonic() + timeout
    found: dict[str, wire.State] = {}
    last: dict[str, Problem] = {}
    with httpx.Client(trust_env=False, timeout=STATE_TIMEOUT) as client:
        while True:
            for url in urls:
                if url not in found:
                    met = _meet(client, url, timeout)
                    if isinstance(met, Problem):
                        last[url] = met
                        if met.code == "MC369":
                            raise UsageError([met])
                    else:
                        found[url] = met
            if len(found) == len(set(urls)):
                return [found[url] for url in urls]
            if time.monotonic() > end:
                raise UsageError([p for url, p in last.items() if url not in found])
            time.sleep(PAUSE)


def _meet(client: httpx.Client, url: str, timeout: float) -> wire.State | Problem:
    try:
        answer = client.get(f"{url}/mcore/state")
    except httpx.HTTPError as error:
        return Problem(
            "MC368",
            f"no vLLM server answers at {url} within {timeout:g} s",
            [
                f"{type(error).__name__}: {error}",
                "fix: start it with `mcore rollout --model DIR --port PORT`, or raise "
                "--vllm_server_timeout",
            ],
        )
    try:
        answer.raise_for_status()
        state = wire.State.read(answer.json())
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        return Problem(
            "MC369",
            f"the server at {url} takes no weights of a training run",
            [
                f"GET {url}/mcore/state: {type(error).__name__} {error}".partition("\n")[0],
                "fix: start it with `mcore rollout`, of the same version as this",
            ],
        )
    return state
