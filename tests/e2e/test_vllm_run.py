"""GRPO with vLLM servers that speak the recorded protocol: they die, and the run goes on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from commands import free_port, metrics, until

DOUBLE = Path(__file__).parents[1] / "unit" / "vllm_double.py"


class Server:
    """The double in a process of its own."""

    def __init__(self, model):
        self.port = free_port()
        self.vocab = json.loads((model / "config.json").read_text())["vocab_size"]
        self.start()

    def start(self):
        self.process = subprocess.Popen([sys.executable, DOUBLE, str(self.port), str(self.vocab)])

    def kill(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture
def server(model):
    made = Server(model)
    yield made
    made.kill()


@pytest.fixture
def grpo(model, tmp_path):
    rows = tmp_path / "prompts.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{i} + 1 = ?"}) + "\n" for i in range(64)))
    reward = tmp_path / "reward.py"
    reward.write_text("def score(rollouts):\n    return [float(len(r.text)) for r in rollouts]\n")
    return [
        "run", "--plugin", "grpo", "--model", model, "--dataset", rows,
        "--reward_funcs", f"{reward}:score", "--global_batch_size", 4, "--micro_batch_size", 2,
        "--num_generations", 4, "--max_completion_length", 12, "--lr", "1e-3", "--beta", 0,
        "--num_workers", 0, "--use_vllm", "true", "--save", tmp_path / "run",
    ]  # fmt: skip


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.parity)])
def test_a_server_dies_and_the_run_goes_on(mcore, grpo, server, ranks):
    """Of two tensor-parallel ranks one speaks with the server."""
    url = f"http://127.0.0.1:{server.port}"
    child = mcore.start(
        [
            *grpo, "--vllm_server_base_url", url, "--nproc_per_node", ranks, "--train_iters", 10,
            "--tensor_model_parallel_size", ranks, "--log_rollout_offpolicy_metrics", "true",
            "--no_save_optim", "--logging_steps", 1,
        ]
    )  # fmt: skip
    until(lambda: "step 3/10" in child.err or not child.alive())
    assert child.alive(), child.err
    server.kill()
    until(lambda: "is away" in child.err or "has gone" in child.err)
    server.start()
    ran = child.wait(90)
    assert ran.code == 0, ran.err
    assert "is there again, with the weights of" in ran.err
    steps = [line for line in metrics(ran.folder()) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 11))
    # what was sampled has the log-probabilities that the server gave, and no others
    assert all("rollout/kl" in line for line in steps)


def test_generation_runs_ahead_of_training(mcore, grpo, server):
    url = f"http://127.0.0.1:{server.port}"
    ran = mcore(
        *grpo, "--vllm_server_base_url", url, "--train_iters", 4, "--no_save_optim",
        "--async_generate", "true", "--max_staleness", 2, "--partial_rollouts", "true",
        "--logging_steps", 1,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    stale = [
        line.get("rollout/staleness_max", 0) for line in metrics(ran.folder()) if "loss" in line
    ]
    assert stale == [0, 1, 2, 2]


def test_mistakes_are_named_before_anything_is_trained(mcore, grpo, server):
    url = f"http://127.0.0.1:{server.port}"
    port = free_port()
    ran = mcore(
        *grpo, "--vllm_server_port", port, "--vllm_mode", "server", "--vllm_server_timeout", 0.2
    )
    assert ran.code == 2 and "MC368" in ran.err and "mcore rollout --model DIR --port" in ran.err
    ran = mcore(*grpo, "--vllm_mode", "colocate")
    assert ran.code == 2 and "MC366" in ran.err and "GPUs only" in ran.err
    lora = ["--tuner_type", "lora", "--vllm_enable_lora", "true"]
    ran = mcore(*grpo, *lora, "--lora_bias", "all", "--vllm_server_base_url", url)
    assert ran.code == 2 and "--lora_bias cannot be honoured" in ran.err
    ran = mcore(*grpo, *lora, "--lora_rank", 32, "--vllm_server_base_url", url)
    assert ran.code == 2 and "takes no adapters" in ran.err
    ran = mcore(
        *grpo, "--vllm_server_base_url", url, "--sleep_level", 1, "--max_completion_length", 900
    )
    assert ran.code == 2 and "--sleep_level does nothing with --vllm_mode server" in ran.err


def test_more_tokens_than_a_server_has_room_for(mcore, grpo, server):
    grpo[grpo.index("--max_completion_length") + 1] = 510
    ran = mcore(*grpo, "--vllm_server_base_url", f"http://127.0.0.1:{server.port}")
    assert ran.code == 1 and "MC845" in ran.err and "--vllm_max_model_len" in ran.err
