"""What runs inside vLLM's server and workers, with an engine and a model that are made up."""

import asyncio
import json
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import httpx
import mcore_rlhf.rollout.vllm
import pytest
import torch
from safetensors.torch import save_file

INSIDE = Path(mcore_rlhf.rollout.vllm.__file__).parent / "inside"


@pytest.fixture
def inside(monkeypatch):
    """The modules as vLLM imports them: by bare names, beside a `vllm` of ours."""
    monkeypatch.syspath_prepend(str(INSIDE))
    vllm = types.ModuleType("vllm")
    vllm.__version__ = "0.32.0"
    vllm.SamplingParams = lambda **given: SimpleNamespace(**given)
    params = types.ModuleType("vllm.sampling_params")
    params.RequestOutputKind = SimpleNamespace(FINAL_ONLY="final")
    lora = types.ModuleType("vllm.lora")
    request = types.ModuleType("vllm.lora.request")
    request.LoRARequest = lambda name, number, path: SimpleNamespace(
        lora_name=name, lora_int_id=number, lora_path=path
    )
    found = {"vllm": vllm, "vllm.sampling_params": params, "vllm.lora": lora}
    for name, module in {**found, "vllm.lora.request": request}.items():
        monkeypatch.setitem(sys.modules, name, module)
    import mcore_vllm_gate
    import mcore_vllm_worker

    yield SimpleNamespace(gate=mcore_vllm_gate, worker=mcore_vllm_worker)
    for name in ("mcore_vllm_gate", "mcore_vllm_worker"):
        sys.modules.pop(name, None)


class Engine:
    """Gives one token after another; each is how many came before it.

    With `pause` it stops after so many tokens, until the request is aborted.
    """

    def __init__(self):
        self.asked, self.aborted, self.calls, self.loras, self.missing = [], set(), [], [], []
        self.pause, self.paused = None, asyncio.Event()
        model = SimpleNamespace(model="m", max_model_len=64, get_vocab_size=lambda: 99)
        self.vllm_config = SimpleNamespace(
            lora_config=SimpleNamespace(max_lora_rank=16), model_config=model
        )

    async def generate(self, prompt, params, request_id, lora_request=None):
        self.asked.append((prompt["prompt_token_ids"], params, lora_request))
        if len(prompt["prompt_token_ids"]) > 60:
            raise ValueError("too long")
        tokens, reason = [], "length"
        while len(tokens) < params.max_tokens:
            await asyncio.sleep(0)
            while len(tokens) == self.pause and request_id not in self.aborted:
                self.paused.set()
                await asyncio.sleep(0.005)
            if request_id in self.aborted:
                reason = "abort"
                break
            tokens.append(len(prompt["prompt_token_ids"]) + len(tokens))
        logprobs = [{t: SimpleNamespace(logprob=-float(t))} for t in tokens]
        done = SimpleNamespace(token_ids=tokens, logprobs=logprobs, finish_reason=reason)
        yield SimpleNamespace(outputs=[done])

    async def abort(self, ids):
        self.aborted |= set(ids)
        self.pause = None

    async def collective_rpc(self, method, args=()):
        self.calls.append((method, *args))
        if method == "mcore_prepare":
            return [{"logps": "tempered", "dtype": "float32", "version": -1}]
        return [{"version": args[1], "tensors": 3, "missing": self.missing}]

    async def reset_prefix_cache(self):
        self.calls.append(("reset",))

    async def add_lora(self, adapter):
        self.loras.append(adapter)
        return True

    async def remove_lora(self, number):
        self.loras = [a for a in self.loras if a.lora_int_id != number]


def serve(inside, talk):
    """Run a conversation with the gate; `talk(client, engine)` is a coroutine function."""
    engine = Engine()
    state = SimpleNamespace(state=SimpleNamespace(engine_client=engine))
    gate = inside.gate.Gate(None)

    async def app(scope, receive, send):
        await gate({**scope, "app": state}, receive, send)

    async def main():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://gate") as client:
            return await talk(client, engine)

    return asyncio.run(main())


def request(key="a", prompt=(1, 2, 3), tokens=4):
    return {
        "id": key,
        "prompt": list(prompt),
        "sampling": {"max_tokens": tokens, "temperature": 1.0, "seed": 5},
    }


def ask(client, *requests, version=0, owner="r"):
    body = {"owner": owner, "version": version, "requests": list(requests)}
    return client.post("/mcore/generate", json=body)


def update(client, version, files, kind="weights", owner="r"):
    body = {"owner": owner, "version": version, "kind": kind, "files": [str(f) for f in files]}
    return client.post("/mcore/update", json=body)


def lines(answer):
    return {line["id"]: line for line in map(json.loads, answer.text.splitlines())}


@pytest.fixture
def weights(tmp_path):
    file = tmp_path / "part.safetensors"
    save_file({"a": torch.zeros(2)}, file)
    return file


def test_only_the_weights_of_the_run_answer(inside, weights):
    async def talk(client, engine):
        before = await ask(client, request())
        assert before.status_code == 409 and engine.asked == []
        assert (await update(client, 0, [weights])).json()["tensors"] == 3
        other = [await ask(client, request(), owner="q"), await ask(client, request(), version=1)]
        assert [a.status_code for a in other] == [409, 409]
        state = (await client.get("/mcore/state")).json()
        assert (state["owner"], state["version"], state["max_lora_rank"]) == ("r", 0, 16)
        found = lines(await ask(client, request("a"), request("b", range(7), 2)))
        assert found["a"] == {
            "id": "a", "tokens": [3, 4, 5, 6], "logps": [-3.0, -4.0, -5.0, -6.0],
            "versions": [[0, 4]], "stop": "length",
        }  # fmt: skip
        assert found["b"]["tokens"] == [7, 8]
        assert ("mcore_load", [str(weights)], 0) in engine.calls and ("reset",) in engine.calls

    serve(inside, talk)


def test_new_weights_go_on_with_what_is_under_way(inside, weights):
    async def talk(client, engine):
        await update(client, 0, [weights])
        engine.pause = 5
        asked = asyncio.create_task(ask(client, request(tokens=40)))
        await engine.paused.wait()
        await update(client, 3, [weights])
        line = lines(await asked)["a"]
        assert line["tokens"] == list(range(3, 43)) and line["stop"] == "length"
        (zero, n), (three, m) = line["versions"]
        assert (zero, three, n, m) == (0, 3, 5, 35)
        first, second = engine.asked
        assert second[0] == [1, 2, 3, *range(3, 3 + n)] and second[1].max_tokens == 40 - n
        assert first[1].seed != second[1].seed and first[1].ignore_eos

    serve(inside, talk)


def test_what_is_cancelled_comes_with_what_it_has(inside, weights):
    async def talk(client, engine):
        await update(client, 0, [weights])
        engine.pause = 5
        asked = asyncio.create_task(ask(client, request("a", tokens=50), request("b")))
        await engine.paused.wait()
        await client.post("/mcore/cancel", json={"ids": ["a", "unknown"]})
        found = lines(await asked)
        assert found["a"]["stop"] == "cancelled" and len(found["a"]["tokens"]) == 5
        assert found["b"]["stop"] == "length"
        assert "a" in lines(await ask(client, request("a"))), "its id may come again"

    serve(inside, talk)


def test_an_error_of_one_request_is_its_line(inside, weights):
    async def talk(client, engine):
        await update(client, 0, [weights])
        found = lines(await ask(client, request("a", range(61)), request("b")))
        assert found["a"] == {"id": "a", "error": "ValueError: too long"}
        assert found["b"]["stop"] == "length"

    serve(inside, talk)


def test_weights_that_are_sent_lie_in_a_file_until_they_are_loaded(inside, tmp_path):
    async def talk(client, engine):
        assert (await update(client, 0, [tmp_path / "none"])).status_code == 412
        assert (await client.put("/mcore/files/part-0", content=b"abc")).status_code == 200
        assert (await client.put("/mcore/files/..%2Fx", content=b"abc")).status_code == 400
        assert (await update(client, 0, ["part-0"])).status_code == 200
        (path,) = engine.calls[-2][1]
        assert Path(path).name == "part-0" and not Path(path).exists()

    serve(inside, talk)


def test_weights_that_vllm_misses_are_an_error_and_nothing_is_answered(inside, weights):
    async def talk(client, engine):
        engine.missing = ["model.norm.weight"]
        answer = await update(client, 0, [weights])
        assert answer.status_code == 500 and "model.norm.weight" in answer.text
        assert (await ask(client, request())).status_code == 409

    serve(inside, talk)


def test_adapters_replace_each_other(inside, tmp_path):
    files = [tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"]
    for file in files:
        file.write_text("x")

    async def talk(client, engine):
        for version in (0, 1):
            await update(client, version, files, kind="adapter")
            await ask(client, request(), version=version)
        assert [a.lora_name for a in engine.loras] == ["mcore-1"]
        assert [lora.lora_name for _, _, lora in engine.asked] == ["mcore-0", "mcore-1"]
        folder = Path(engine.loras[0].lora_path)
        assert sorted(f.name for f in folder.iterdir()) == sorted(f.name for f in files)
        assert not Path(engine.asked[0][2].lora_path).exists()
        await update(client, 2, [files[0]])
        assert engine.loras == [], "whole weights have the adapter in them"
        await ask(client, request(), version=2)
        assert engine.asked[-1][2] is None
        again = await update(client, 3, files, kind="adapter")
        assert again.status_code == 400 and "start the server anew" in again.text
        engine.vllm_config.lora_config = None
        assert "vllm_enable_lora" in (await update(client, 2, files, kind="adapter")).text

    serve(inside, talk)


def test_other_paths_are_vllms_own(inside):
    seen = []

    async def vllm(scope, receive, send):
        seen.append(scope["path"])

    asyncio.run(inside.gate.Gate(vllm)({"type": "http", "path": "/v1/models"}, None, None))
    assert seen == ["/v1/models"]


# -- workers ---------------------------------------------------------------------------------------


class Sampler(torch.nn.Module):
    """As vLLM's: raw log-probabilities come before the temperature."""

    @staticmethod
    def compute_logprobs(logits):
        return logits.log_softmax(-1)

    def forward(self, logits, sampling_metadata, predict_bonus_token=False):
        return self.compute_logprobs(logits)


def test_log_probabilities_are_under_the_temperature(inside):
    sampler = Sampler()
    assert inside.worker.temper(sampler)
    logits = torch.randn(3, 11)
    warmth = torch.tensor([0.5, 0.0, 2.0])
    found = sampler(logits, SimpleNamespace(temperature=warmth))
    scale = torch.tensor([[0.5], [1.0], [2.0]])  # greedy: as at 1
    torch.testing.assert_close(found, (logits / scale).log_softmax(-1))
    greedy = sampler(logits, SimpleNamespace(temperature=None))
    torch.testing.assert_close(greedy, logits.log_softmax(-1))
    assert not inside.worker.temper(None), "another kind of sampler is left as it is"


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Linear(2, 2, bias=False)
        self.head = torch.nn.Linear(2, 2, bias=False)
        self.head.weight = self.embed.weight
        self.norm = torch.nn.Parameter(torch.zeros(2))
        self.packed = 0
        packer = SimpleNamespace(process_weights_after_loading=self.pack)
        self.head.quant_method, self.head.cpu_linear = packer, object()

    def pack(self, layer):
        self.packed += 1

    def load_weights(self, weights):
        own, found = dict(self.named_parameters()), set()
        for name, tensor in weights:
            if name in own:
                own[name].data.copy_(tensor)
                found.add(name)
        return found


def test_workers_load_every_tensor_and_say_what_was_missing(inside, tmp_path):
    worker = inside.worker.PolicyWorker()
    model = Model()
    worker.model_runner = SimpleNamespace(
        model=model,
        sampler=Sampler(),
        model_config=SimpleNamespace(dtype=torch.float32),
        reload_weights=lambda weights_iterator=None: model.load_weights(weights_iterator),
    )
    assert worker.mcore_prepare() == {"logps": "tempered", "dtype": "float32", "version": -1}
    tensors = {"embed.weight": torch.ones(2, 2), "norm": torch.full((2,), 3.0)}
    for i, (name, tensor) in enumerate(tensors.items()):
        save_file({name: tensor}, tmp_path / f"{i}")
    found = worker.mcore_load([str(tmp_path / "0"), str(tmp_path / "1")], 4)
    assert found == {"version": 4, "tensors": 2, "missing": []}
    assert worker.mcore_version() == 4 and model.norm.tolist() == [3.0, 3.0]
    assert model.packed == 1, "the head reads the embedding's weight anew"
    assert worker.mcore_load([str(tmp_path / "0")], 5)["missing"] == ["norm"]
