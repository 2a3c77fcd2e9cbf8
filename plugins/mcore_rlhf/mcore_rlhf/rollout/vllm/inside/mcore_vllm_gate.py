"""Runs in vLLM's server, in vLLM's own Python: the endpoints that a training run speaks with.

vLLM knows it as `--middleware mcore_vllm_gate.Gate`; it imports nothing of mcore. Under /mcore:

    GET  /mcore/state        what the server is, and the policy step of its weights
    POST /mcore/generate     {"owner", "version", "requests"} -> a JSON line for each, when done
    POST /mcore/cancel       {"ids"}: their lines come at once, with what there is
    PUT  /mcore/files/NAME   a part of the weights
    POST /mcore/update       {"owner", "version", "kind", "files"}: use them from now on

An owner is a run. What is asked for another owner or version than the weights have is refused
(409): a server that was restarted never answers with the weights of its start.

While weights are loaded nothing is generated: requests under way are read anew with the new ones
and go on, and their line says how many tokens are of which version. Every other path is vLLM's own.
"""

import asyncio
import json
import os
import re
import shutil
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

PROTOCOL = 1
HEARTBEAT = 5.0
"""Seconds after which an empty line says that the server is alive."""
NAME = re.compile(r"[A-Za-z0-9._-]+")
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")


class Refused(Exception):
    """A request that cannot be served, with its HTTP status."""

    def __init__(self, status: int, **answer: Any) -> None:
        super().__init__(str(answer))
        self.status, self.answer = status, answer


class Gate:
    """ASGI middleware: answers what is under /mcore, hands on everything else."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.policy: Policy | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one connection."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, self._announcing(send))
            return
        if scope["type"] != "http" or not scope["path"].startswith("/mcore/"):
            await self.app(scope, receive, send)
            return
        if self.policy is None:
            self.policy = Policy(scope["app"].state.engine_client)
        try:
            await self._serve(self.policy, scope, receive, send)
        except Refused as refused:
            await answer(send, refused.status, refused.answer)
        except Exception as error:  # the run prints it
            await answer(send, 500, {"error": f"{type(error).__name__}: {error}"})

    async def _serve(self, policy: "Policy", scope: Any, receive: Any, send: Any) -> None:
        path = scope["path"].removeprefix("/mcore/")
        match scope["method"], path:
            case "GET", "state":
                await answer(send, 200, await policy.state())
            case "POST", "generate":
                await stream(policy, json.loads(await body(receive)), receive, send)
            case "POST", "cancel":
                policy.cancel(json.loads(await body(receive))["ids"])
                await answer(send, 200, {})
            case "POST", "update":
                asked = json.loads(await body(receive))
                await answer(send, 200, await policy.update(**asked))
            case "PUT", _ if path.startswith("files/"):
                await policy.keep(path.removeprefix("files/"), receive)
                await answer(send, 200, {})
            case _:
                raise Refused(404, error=f"no {scope['method']} {scope['path']}")

    def _announcing(self, send: Any) -> Any:
        async def announcing(message: Any) -> None:
            if message["type"] == "lifespan.startup.complete":
                where = os.environ.get("MCORE_ROLLOUT_URL", "")
                sys.stderr.write(f"mcore rollout: ready  {where}\n")
            sys.stderr.flush()
            await send(message)

        return announcing


class Policy:
    """vLLM's engine with weights that have a version."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.boot = uuid.uuid4().hex
        self.owner, self.version = "", -1
        self.folder = tempfile.mkdtemp(prefix="mcore-rollout-")
        self._workers: list[dict[str, Any]] = []
        self._adapter: Any = None
        self._replaced = False
        """Whether the weights are no more those of the start."""
        self._updates = 0
        self._open = asyncio.Event()
        self._open.set()
        self._loading = asyncio.Lock()
        self._under_way: dict[str, str] = {}
        """The id in the engine of each request that is being generated, by its own."""
        self._cancelled: set[str] = set()
        self.waiting: set[str] = set()

    async def state(self) -> dict[str, Any]:
        """Return what the server is."""
        if not self._workers:
            self._workers = await self.engine.collective_rpc("mcore_prepare")
        import vllm

        config = self.engine.vllm_config
        lora = config.lora_config
        return {
            "protocol": PROTOCOL,
            "boot": self.boot,
            "host": host(),
            "owner": self.owner,
            "version": self.version,
            "vllm": vllm.__version__,
            "model": config.model_config.model,
            "vocab_size": config.model_config.get_vocab_size(),
            "max_model_len": config.model_config.max_model_len,
            "dtype": self._workers[0]["dtype"],
            "logps": self._workers[0]["logps"],
            "workers": len(self._workers),
            "max_lora_rank": None if lora is None else lora.max_lora_rank,
            "busy": len(self.waiting),
        }

    # -- generation --------------------------------------------------------------------------------

    async def complete(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Generate one completion, over as many versions of the weights as come meanwhile."""
        tokens: list[int] = []
        logps: list[float] = []
        versions: list[list[int]] = []
        key = asked["id"]
        self.waiting.add(key)
        try:
            while True:
                await self._open.wait()
                version = self.version
                if key in self._cancelled:
                    reason = "cancelled"
                else:
                    found = await self._pass(asked, tokens)
                    tokens += found.token_ids
                    logps += [p[t].logprob for p, t in zip(found.logprobs or (), found.token_ids)]
                    if found.token_ids:
                        versions.append([version, len(found.token_ids)])
                    reason = found.finish_reason
                if reason == "abort" and key not in self._cancelled:
                    continue  # new weights have come
                stop = reason if reason in ("stop", "length") else "cancelled"
                return {
                    "id": key, "tokens": tokens, "logps": logps, "versions": versions, "stop": stop,
                }  # fmt: skip
        except (asyncio.CancelledError, GeneratorExit):
            raise
        except Exception as error:
            return {"id": key, "error": f"{type(error).__name__}: {error}"}
        finally:
            self._under_way.pop(key, None)
            self._cancelled.discard(key)
            self.waiting.discard(key)

    async def _pass(self, asked: dict[str, Any], tokens: list[int]) -> Any:
        """Generate until the end, or until it is aborted; return vLLM's CompletionOutput."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = dict(asked["sampling"])
        sampling["max_tokens"] -= len(tokens)
        sampling["seed"] = (sampling["seed"] + 0x9E3779B9 * len(tokens)) % 2**48
        params = SamplingParams(
            **sampling,
            logprobs=0,
            ignore_eos=True,
            include_stop_str_in_output=True,
            skip_special_tokens=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        inside = f"{asked['id']}-{uuid.uuid4().hex[:8]}"
        self._under_way[asked["id"]] = inside
        last = None
        prompt = {"prompt_token_ids": [*asked["prompt"], *tokens]}
        more = {} if self._adapter is None else {"lora_request": self._adapter}
        async for output in self.engine.generate(prompt, params, inside, **more):
            last = output
        self._under_way.pop(asked["id"], None)
        if last is None:
            raise RuntimeError("vLLM gave no output for an aborted request")
        return last.outputs[0]

    def cancel(self, ids: list[str]) -> None:
        """End requests; `complete` returns what they have."""
        known = [key for key in ids if key in self.waiting]
        self._cancelled |= set(known)
        inside = [self._under_way[key] for key in known if key in self._under_way]
        if inside:
            task = asyncio.ensure_future(self.engine.abort(inside))
            task.add_done_callback(lambda done: done.exception())

    # -- weights -----------------------------------------------------------------------------------

    async def keep(self, name: str, receive: Any) -> None:
        """Write what is sent into a file."""
        if not NAME.fullmatch(name):
            raise Refused(400, error=f"no name for a file: {name!r}")
        with open(os.path.join(self.folder, name), "wb") as out:
            async for part in parts(receive):
                out.write(part)

    async def update(self, owner: str, version: int, kind: str, files: list[str]) -> dict[str, Any]:
        """Load weights, or an adapter, and use them from now on."""
        paths = [file if os.path.isabs(file) else os.path.join(self.folder, file) for file in files]
        if lost := [path for path in paths if not os.access(path, os.R_OK)]:
            raise Refused(412, error=f"this server cannot read {lost[0]}")
        begin = time.perf_counter()
        async with self._loading:
            self._open.clear()
            self.version = -1
            try:
                while self._under_way:
                    await self.engine.abort(list(self._under_way.values()))
                    await asyncio.sleep(0.01)
                if kind == "adapter":
                    tensors = await self._load_adapter(version, paths)
                else:
                    tensors = await self._load(version, paths)
                await self.engine.reset_prefix_cache()
                self.owner, self.version = owner, version
            finally:
                self._open.set()
        for file in files:
            if not os.path.isabs(file) and kind != "adapter":
                os.unlink(os.path.join(self.folder, file))
        return {"version": version, "tensors": tensors, "seconds": time.perf_counter() - begin}

    async def _load(self, version: int, paths: list[str]) -> int:
        self._replaced = True
        await self._drop_adapter()
        done = await self.engine.collective_rpc("mcore_load", args=(paths, version))
        seen = {one["version"] for one in done}
        if seen != {version}:
            raise RuntimeError(
                f"workers have the weights of steps {sorted(seen)}, not of {version}"
            )
        if missing := done[0]["missing"]:
            raise RuntimeError(f"weights that were not sent: {', '.join(missing[:8])}")
        return int(done[0]["tensors"])

    async def _load_adapter(self, version: int, paths: list[str]) -> int:
        from vllm.lora.request import LoRARequest

        if self.engine.vllm_config.lora_config is None:
            raise Refused(
                400, error="the server takes no adapters: it was started without --vllm_enable_lora"
            )
        if self._replaced:
            raise Refused(
                400,
                error="an earlier run has replaced the weights that the adapter is for: start the "
                "server anew",
            )
        self._updates += 1
        folder = os.path.join(self.folder, f"adapter-{self._updates}")
        os.mkdir(folder)
        for path, name in zip(paths, ADAPTER_FILES):
            shutil.copyfile(path, os.path.join(folder, name))
        adapter = LoRARequest(f"mcore-{version}", self._updates, folder)
        if not await self.engine.add_lora(adapter):
            raise RuntimeError("vLLM did not load the adapter")
        await self._drop_adapter()
        self._adapter = adapter
        return 1

    async def _drop_adapter(self) -> None:
        if self._adapter is not None:
            await self.engine.remove_lora(self._adapter.lora_int_id)
            shutil.rmtree(self._adapter.lora_path, ignore_errors=True)
        self._adapter = None


async def stream(policy: Policy, asked: dict[str, Any], receive: Any, send: Any) -> None:
    """Generate a batch and send each completion when it is done."""
    if (asked["owner"], asked["version"]) != (policy.owner, policy.version):
        raise Refused(409, owner=policy.owner, version=policy.version)
    head = [(b"content-type", b"application/x-ndjson")]
    await send({"type": "http.response.start", "status": 200, "headers": head})
    lines: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()

    async def one(request: dict[str, Any]) -> None:
        lines.put_nowait(await policy.complete(request))

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        lines.put_nowait(None)

    tasks = [asyncio.ensure_future(one(request)) for request in asked["requests"]]
    watching = asyncio.ensure_future(watch())
    try:
        left = len(tasks)
        while left:
            try:
                line = await asyncio.wait_for(lines.get(), HEARTBEAT)
            except asyncio.TimeoutError:
                data = b"\n"
            else:
                if line is None:
                    return
                left -= 1
                data = json.dumps(line, separators=(",", ":")).encode() + b"\n"
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
    finally:
        watching.cancel()
        for task in tasks:
            task.cancel()


async def parts(receive: Callable[[], Awaitable[Any]]) -> Any:
    """Yield a request's body as it comes."""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Refused(400, error="the connection was closed")
        yield message.get("body", b"")
        if not message.get("more_body"):
            return


async def body(receive: Callable[[], Awaitable[Any]]) -> bytes:
    """Return a request's body."""
    return b"".join([part async for part in parts(receive)])


async def answer(send: Any, status: int, content: dict[str, Any]) -> None:
    """Send JSON."""
    head = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": json.dumps(content).encode()})


def host() -> str:
    """Return what tells this machine from others."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{socket.gethostname()}/{file.read().strip()}"
    except OSError:
        return socket.gethostname()
