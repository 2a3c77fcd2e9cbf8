"""A real vLLM server on the CPU, in the environment whose python MCORE_VLLM_PYTHON names.

With MCORE_SMOLLM2, a folder of SmolLM2-135M-Instruct. It starts servers: minutes on two cores.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import torch
from commands import free_port, metrics, until

PYTHON, MODEL = os.environ.get("MCORE_VLLM_PYTHON"), os.environ.get("MCORE_SMOLLM2")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(PYTHON is None, reason="MCORE_VLLM_PYTHON names no python that has vLLM"),
    pytest.mark.skipif(MODEL is None, reason="MCORE_SMOLLM2 names no model folder"),
]


class Server:
    """What `mcore rollout` starts."""

    def __init__(self, log, *options):
        self.log, self.options, self.port = log, options, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()
        self.ready()

    def start(self):
        program = Path(PYTHON).parent / "vllm"
        line = [
            sys.executable, "-m", "mcore_core.cli.main", "rollout", "--model", MODEL,
            "--vllm", program, "--port", self.port, "--vllm_max_model_len", 256,
            "--vllm_enforce_eager", "true", *self.options, "--", "--dtype", "float32",
        ]  # fmt: skip
        self.process = subprocess.Popen(
            [str(part) for part in line],
            env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"},
            stdout=self.log.open("a"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def state(self):
        try:
            return httpx.get(f"{self.url}/mcore/state", timeout=5).json()
        except httpx.HTTPError:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            return None

    def ready(self):
        until(self.state, timeout=600)

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def greedy(self, prompt, number):
        """What the server writes with the weights it has."""
        state = self.state()
        sampling = {
            "max_tokens": number, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "stop": [],
            "repetition_penalty": 1.0, "stop_token_ids": [], "seed": 0,
        }  # fmt: skip
        asked = {
            "owner": state["owner"],
            "version": state["version"],
            "requests": [{"id": "greedy", "prompt": prompt, "sampling": sampling}],
        }
        answer = httpx.post(f"{self.url}/mcore/generate", json=asked, timeout=120)
        line = json.loads(answer.text)
        return line["tokens"], line["logps"]


@pytest.fixture
def grpo(tmp_path):
    rows = tmp_path / "prompts.jsonl"
    asked = [f"What is {a} + {b}?" for a in range(4) for b in range(4)]
    rows.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in asked))
    reward = tmp_path / "reward.py"
    reward.write_text("def score(rollouts):\n    return [float(len(r.text)) for r in rollouts]\n")
    return [
        "run", "--plugin", "grpo", "--model", MODEL, "--dataset", rows, "--torch_dtype", "float32",
        "--reward_funcs", f"{reward}:score", "--global_batch_size", 4, "--micro_batch_size", 4,
        "--num_generations", 4, "--max_completion_length", 16, "--lr", "2e-5", "--beta", 0,
        "--num_workers", 0, "--use_vllm", "true", "--save", tmp_path / "run", "--no_save_optim",
        "--log_rollout_offpolicy_metrics", "true", "--logging_steps", 1, "--lr_warmup_iters", 0,
        "--vllm_server_timeout", 600,
    ]  # fmt: skip


def checked(run, steps):
    """In every step the server's log-probabilities are the trainer's: it has its weights."""
    lines = [line for line in metrics(run) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    assert max(line["rollout/abs_diff_mean"] for line in lines) < 1e-4


def same_as_trainer(server, folder, steps):
    """Greedy output of the server equals that of the saved weights, which are a step further.

    So the folder is loaded into the server first, as a run that goes on from it would do.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    start = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    prompt = [504, 3575, 282, 4649, 314]
    update = {
        "owner": "test", "version": steps, "kind": "weights",
        "files": [str(f) for f in sorted(Path(folder).glob("*.safetensors"))],
    }  # fmt: skip
    assert httpx.post(f"{server.url}/mcore/update", json=update, timeout=300).status_code == 200
    tokens, logps = server.greedy(prompt, 24)
    ids = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(24):
            ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), 1)
        assert tokens == ids[0, len(prompt) :].tolist()
        for weights, close in ((model, True), (start, False)):
            wanted = weights(ids).logits[0].log_softmax(-1)[range(4, 28), tokens]
            assert (float((wanted - torch.tensor(logps)).abs().max()) < 1e-4) == close


def test_a_server_that_is_killed_in_the_middle_of_a_round(mcore, grpo, tmp_path):
    server = Server(tmp_path / "server.log")
    try:
        grpo[grpo.index("--max_completion_length") + 1] = 96
        child = mcore.start([*grpo, "--vllm_server_base_url", server.url, "--train_iters", 3])
        until(lambda: "step 1/3" in child.err or not child.alive(), timeout=300)
        until(lambda: (server.state() or {}).get("busy") or not child.alive(), timeout=120)
        assert child.alive(), child.err
        boot = server.state()["boot"]
        server.kill()
        server.start()
        ran = child.wait(900)
        assert ran.code == 0, ran.err
        assert server.state()["boot"] != boot
        assert "left 4 requests without an answer" in ran.err
        assert "is there again, with the weights of step" in ran.err
        checked(ran.folder(), 3)
        same_as_trainer(server, ran.folder() / "checkpoint-3", 3)
    finally:
        server.kill()


def test_adapters_alone(mcore, grpo, tmp_path):
    server = Server(tmp_path / "server.log", "--vllm_enable_lora", "true", "--lora_rank", 8)
    lora = ["--tuner_type", "lora", "--lora_rank", 8, "--lr", "1e-3", "--train_iters", 3]
    del grpo[grpo.index("--lr") : grpo.index("--lr") + 2]
    try:
        for more in (["--vllm_enable_lora", "true"], ["--vllm_enable_lora", "false"]):
            ran = mcore(*grpo, *lora, *more, "--vllm_server_base_url", server.url, timeout=600)
            assert ran.code == 0, ran.err
            checked(ran.folder(), 3)
    finally:
        server.kill()
