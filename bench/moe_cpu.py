"""Tokens a second of one layer of experts: ours, megatron's SequentialMLP, transformers' Qwen3-MoE.

The same weights, tokens and routing in one process, forward and backward, float32 on the CPU. Each
is run in turn, round after round, and the best round of each counts; outputs are compared first.

    OMP_NUM_THREADS=2 python bench/moe_cpu.py [--tokens 2048] [--experts 16] [--rounds 7]
"""

# ruff: noqa: ANN401
import argparse
import json
import os
import time
from collections.abc import Callable
from typing import Any


def main() -> None:
    """Run and print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (
        ("tokens", 2048),
        ("hidden", 512),
        ("width", 256),
        ("experts", 16),
        ("topk", 4),
        ("rounds", 7),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    from mcore_core.testing.ranks import fork_ranks

    (found,) = fork_ranks(lambda _: measure(options), 1, timeout=1200)
    print(json.dumps(found, indent=1))


def measure(options: Any) -> dict[str, Any]:
    """Build the three layers, compare and time them."""
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    x = torch.randn(options.tokens, options.hidden, generator=torch.Generator().manual_seed(1))
    layers = build(options)
    outputs, seconds = {}, {name: [] for name in layers}
    for name, run in layers.items():
        outputs[name] = run(x.clone().requires_grad_())
    first = outputs["ours"]
    differ = {n: float((o - first).abs().max() / first.abs().max()) for n, o in outputs.items()}
    for _ in range(options.rounds):
        for name, run in layers.items():
            begin = time.perf_counter()
            run(x.clone().requires_grad_()).sum().backward()
            seconds[name].append(time.perf_counter() - begin)
    return {
        "sizes": vars(options),
        "threads": torch.get_num_threads(),
        "largest_difference": differ,
        "tokens_per_second": {n: round(options.tokens / min(s)) for n, s in seconds.items()},
    }


def build(options: Any) -> dict[str, Callable[[Any], Any]]:
    """Return the layers as functions of tokens [T, H]."""
    import torch
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import SequentialMLP
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    from mcore_core.config.kernel import kernel_config
    from mcore_core.model.architecture import Architecture
    from mcore_core.model.build import ModelPlan, decoder_config
    from mcore_core.model.moe.experts import GroupedMLP
    from mcore_core.model.moe.layer import PackedMoELayer
    from mcore_core.model.moe.router import Router
    from mcore_core.model.shapes import MoEShape
    from mcore_core.parallel import state
    from mcore_core.parallel.topology import Layout
    from mcore_core.platform import install

    state.initialize(install(), Layout(), seed=1)
    moe = MoEShape(
        num_experts=options.experts, topk=options.topk, ffn_hidden_size=options.width, layers=(0,)
    )
    shape = Architecture(
        num_layers=1,
        hidden_size=options.hidden,
        ffn_hidden_size=options.width,
        num_attention_heads=8,
        num_query_groups=8,
        kv_channels=options.hidden // 8,
        vocab_size=64,
        max_position_embeddings=128,
        moe=moe,
    )
    plan = ModelPlan(
        architecture=shape,
        layout=Layout(),
        stage_layers=[1],
        dtype=torch.float32,
        transformer_engine=False,
    )
    config = decoder_config(plan, kernel_config(), on_cpu=True)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    from megatron.core.transformer.moe.moe_layer import MoESubmodules

    def layer(experts: Any) -> Any:
        found = PackedMoELayer(
            config,
            submodules=MoESubmodules(experts=experts, router=Router),
            layer_number=2,
            pg_collection=groups,
        )
        found.set_layer_number(2)
        return found

    parts = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)

    def sequential(count: int, config: Any, **kwargs: Any) -> Any:
        return SequentialMLP(count, config, submodules=parts, **kwargs)

    ours, theirs = layer(GroupedMLP), layer(sequential)
    hf = Qwen3MoeSparseMoeBlock(
        Qwen3MoeConfig(
            hidden_size=options.hidden,
            moe_intermediate_size=options.width,
            num_experts=options.experts,
            num_experts_per_tok=options.topk,
            norm_topk_prob=True,
            experts_implementation="grouped_mm",
        )
    )
    with torch.no_grad():
        fc1, fc2 = ours.experts.linear_fc1.weight, ours.experts.linear_fc2.weight
        for e, expert in enumerate(theirs.experts.local_experts):
            expert.linear_fc1.weight.copy_(fc1[e])
            expert.linear_fc2.weight.copy_(fc2[e])
        theirs.router.weight.copy_(ours.router.weight)
        hf.gate.weight.copy_(ours.router.weight)
        hf.experts.gate_up_proj.copy_(fc1.view_as(hf.experts.gate_up_proj))
        hf.experts.down_proj.copy_(fc2.view_as(hf.experts.down_proj))

    def here(module: Any) -> Callable[[Any], Any]:
        return lambda x: module(x.unsqueeze(1))[0].squeeze(1)

    def there(x: Any) -> Any:
        out = hf(x.unsqueeze(0))
        return (out[0] if isinstance(out, tuple) else out).squeeze(0)

    return {"ours": here(ours), "megatron SequentialMLP": here(theirs), "transformers": there}


if __name__ == "__main__":
    main()
