"""The CPU platform: calls that would raise without CUDA get a meaning, nothing else changes."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from mcore_core import compat

ENVIRONMENT = {
    **os.environ,
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}


def python(code):
    """Run code in a fresh process; return its output, without warnings."""
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_what_raised_works_and_what_worked_is_as_before():
    """Both are asked of the same process, before and after install()."""
    out = python(
        """
        import torch

        raises = {
            "current_device": lambda: torch.cuda.current_device(),
            "synchronize": lambda: torch.cuda.synchronize(),
            "zeros": lambda: torch.zeros(2, device="cuda"),
            "full_like": lambda: torch.full_like(torch.ones(2), 3.0, device="cuda:0"),
            "new_empty": lambda: torch.ones(1).new_empty(2, device="cuda"),
            "tensor": lambda: torch.tensor([1.0], device=torch.device("cuda", 0)),
            ".cuda": lambda: torch.ones(2).cuda(),
            ".to": lambda: torch.ones(2).to("cuda"),
            ".to dtype": lambda: torch.ones(2).to(device="cuda", dtype=torch.bfloat16),
            "module.cuda": lambda: torch.nn.Linear(2, 2).cuda(),
            "module.to": lambda: torch.nn.Linear(2, 2).to("cuda"),
            "rng": lambda: torch.cuda.get_rng_state(),
            "capability": lambda: torch.cuda.get_device_capability(),
            "stream": lambda: torch.cuda.current_stream().synchronize(),
            "pinned": lambda: torch.empty(2, pin_memory=True),
        }
        same = {
            "available": lambda: torch.cuda.is_available(),
            "initialized": lambda: torch.cuda.is_initialized(),
            "zeros": lambda: torch.zeros(2).device.type,
            "meta": lambda: torch.zeros(2, device="meta").device.type,
            "to": lambda: str(torch.ones(2).to(torch.float64).dtype),
            "to tensor": lambda: str(torch.ones(2).to(torch.ones(1, dtype=torch.int8)).dtype),
            "to meta": lambda: torch.ones(2).to("meta").device.type,
            "type": lambda: torch.ones(2).type() == "torch.FloatTensor",
            "type int": lambda: torch.ones(2).type() == "torch.IntTensor",
            "type to": lambda: str(torch.ones(2).type(torch.int32).dtype),
            "type hash": lambda: {"torch.FloatTensor": 1}[torch.ones(2).type()],
            "seeded": lambda: (torch.manual_seed(3), torch.rand(3).tolist())[1],
            "randn": lambda: (torch.manual_seed(3), torch.randn(2, 2).tolist())[1],
            "module": lambda: str(torch.nn.Linear(2, 2).to(torch.float16).weight.dtype),
            "requires_grad": lambda: torch.zeros(2, requires_grad=True).requires_grad,
        }
        def outcome(call):
            try:
                call()
            except (RuntimeError, AssertionError, AttributeError):
                return "raises"
            return "works"

        before = {n: outcome(c) for n, c in raises.items()}
        values = {n: c() for n, c in same.items()}
        from mcore_core.platform import install
        platform = install()
        assert install() is platform
        assert platform.name == "cpu" and platform.backend == "gloo"
        wrong = [n for n, o in before.items() if o != "raises"]
        broken = [n for n, c in raises.items() if outcome(c) != "works"]
        changed = [n for n, c in same.items() if c() != values[n]]
        print(wrong, broken, changed, torch.cuda.is_available())
        assert torch.ones(2).type() == "torch.cuda.FloatTensor"
        assert str(torch.ones(2).cuda().device) == "cpu"
        assert torch.full_like(torch.ones(2), 3.0, device="cuda:0").tolist() == [3.0, 3.0]
        """
    )
    # pinning memory without a device works, or not, by build of torch
    assert out in ("[] [] [] False", "['pinned'] [] [] False")


def test_other_libraries_still_see_a_cpu_machine(tmp_path):
    """Also: a file written for CUDA loads, and half-installed GPU packages look absent."""
    out = python(
        f"""
        from mcore_core import compat
        compat.apply()
        import torch
        from torch.utils.data import DataLoader, TensorDataset
        from transformers import LlamaConfig, LlamaForCausalLM

        data = TensorDataset(torch.arange(6.0))
        for options in ({{}}, {{"num_workers": 1}}, {{"pin_memory": True}}):
            rows = [x.tolist() for (x,) in DataLoader(data, batch_size=4, **options)]
            assert rows == [[0.0, 1.0, 2.0, 3.0], [4.0, 5.0]], rows
        config = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                             num_attention_heads=2, vocab_size=11)
        model = LlamaForCausalLM(config)
        out = model.generate(torch.tensor([[1, 2]]), max_new_tokens=3, min_new_tokens=3,
                             do_sample=False, pad_token_id=0)
        model(torch.tensor([[1, 2]]), labels=torch.tensor([[1, 2]])).loss.backward()
        print(model.device, tuple(out.shape), torch.accelerator.is_available())
        torch.save(torch.ones(2), r"{tmp_path}/x.pt")
        print(torch.load(r"{tmp_path}/x.pt", map_location="cuda:0").tolist())
        with torch.device("meta"):
            print(torch.empty(2).device, torch.zeros(2, device="cuda").device)
        for name in ("transformer_engine", "apex", "flash_attn"):
            try:
                __import__(name)
            except ModuleNotFoundError:
                print(name)
        """
    )
    assert out.splitlines() == [
        "cpu (1, 5) False",
        "[1.0, 1.0]",
        "meta cpu",
        "transformer_engine",
        "apex",
        "flash_attn",
    ]


def test_install_must_precede_megatron():
    out = python(
        """
        import sys, types
        sys.modules["megatron.core"] = types.ModuleType("megatron.core")
        from mcore_core.platform import install
        try:
            install()
        except RuntimeError as error:
            print(error)
        """
    )
    assert out == "mcore_core.platform.install() must run before megatron is imported"


def test_what_the_platform_reports():
    compat.apply()
    from mcore_core.platform import install

    platform = install()
    assert platform.device_name() == f"CPU, {os.cpu_count()} cores"
    assert str(platform.set_device(3)) == str(platform.device()) == "cpu"
    assert 2**24 < platform.memory() < platform.memory_total()


def _collectives(rank):
    import torch
    import torch.distributed as dist

    uneven = [torch.empty(2), torch.empty(3)]
    dist.all_gather(uneven, torch.full((2 + rank,), float(rank)))
    even = [torch.empty(2), torch.empty(2)]
    dist.all_gather(even, torch.full((2,), float(rank)))
    part = torch.empty(1 + rank)
    dist.reduce_scatter(part, [torch.ones(1) * (rank + 1), torch.tensor([1.0, 2.0]) * (rank + 1)])
    sizes = torch.tensor([1, 2]) if rank == 0 else torch.tensor([2, 1])
    received = torch.tensor([1, 2]) if rank == 0 else torch.tensor([2, 1])
    out = torch.empty(3)
    dist.all_to_all_single(out, torch.arange(3.0) + 10 * rank, received, sizes)
    dist.barrier(device_ids=[0])
    return [t.tolist() for t in (*uneven, *even, part, out)]


def test_collectives_that_gloo_lacks():
    from mcore_core.testing.ranks import fork_ranks

    first, second = fork_ranks(_collectives, 2)
    gathered = [[0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0], [1.0, 1.0]]
    assert first == [*gathered, [3.0], [0.0, 10.0, 11.0]]
    assert second == [*gathered, [3.0, 6.0], [1.0, 2.0, 12.0]]


def _ended(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()


def test_a_killed_rank_leaves_no_process_behind(tmp_path):
    """Saving keeps a helper process: it must not outlive a kill, nor hold the terminal open."""
    compat.apply()
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    told = tmp_path / "pid"
    pid = os.fork()
    if pid == 0:
        queue = filesystem_async.get_write_results_queue()
        queue.put("works")
        assert queue.get() == "works"
        told.write_text(str(queue._manager._process.pid))
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    helper = int(told.read_text())
    end = time.monotonic() + 5
    while not _ended(helper) and time.monotonic() < end:
        time.sleep(0.02)
    assert _ended(helper)


MATMUL = """
    import time

    import torch

    torch.set_num_threads(1)
    from mcore_core import platform
    from mcore_core.platform import cpu_matmul

    platform.install()
"""


def test_products_are_right_whoever_computes_them():
    """Every way a matrix may lie in memory; what oneDNN does not take is left to torch."""
    out = python(
        MATMUL
        + """
    torch.manual_seed(0)
    for size in (8, 200):
        a, b = torch.randn(size, size + 3), torch.randn(size + 3, size + 5)
        ways = {
            "plain": (a, b),
            "transposed": (a.t().contiguous().t(), b.t().contiguous().t()),
            "parts": (torch.randn(size, 2 * size)[:, : size + 3], b.repeat(1, 2)[:, 3:]),
            "expanded": (torch.randn(1, size + 3).expand(size, -1), b),
            "every second": (torch.randn(size, 2 * size + 6)[:, ::2], b),
            "double": (a.double(), b.double()),
            "bfloat16": (a.bfloat16(), b.bfloat16()),
        }
        for name, (x, y) in ways.items():
            for product in (torch.mm, cpu_matmul.product):
                got, wanted = product(x, y), x.double() @ y.double()
                far = float((got.double() - wanted).abs().max() / wanted.abs().max())
                assert far < (2**-7 if name == "bfloat16" else 1e-6), (name, far)
                assert got.dtype is x.dtype and got.is_contiguous() and got.shape == wanted.shape
    x = torch.randn(200, 300, requires_grad=True)
    w = torch.randn(400, 300, requires_grad=True)
    g = torch.randn(200, 400)
    torch.nn.functional.linear(x, w).backward(g)
    for mine, wanted in ((x.grad, g.double() @ w.double()), (w.grad, g.double().t() @ x.double())):
        torch.testing.assert_close(mine.double(), wanted, rtol=1e-5, atol=1e-4)
    print("fine")
    """
    )
    assert out == "fine"


@pytest.mark.slow
def test_mkl_is_still_slow_here():
    """Fails once torch's own product is as fast: then platform/cpu_matmul.py has no reason left."""
    from mcore_core.platform import cpu_matmul

    if not cpu_matmul.mkl_is_slow():
        pytest.skip("an Intel processor, or one without AVX-512: torch's own product is used")
    out = python(
        MATMUL
        + """
    x, w = torch.randn(512, 576), torch.randn(576, 3072)
    out = torch.empty(512, 3072)

    def seconds(call):
        found = []
        for _ in range(7):
            begin = time.thread_time()
            call()
            found.append(time.thread_time() - begin)
        return min(found)

    print(seconds(lambda: torch.ops.aten.mm.out(x, w, out=out)) / seconds(lambda: torch.mm(x, w)))
    """
    )
    assert float(out) > 1.3
