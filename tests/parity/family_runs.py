"""Logits and gradients of a family's model: transformers', and ours on one rank."""

import torch
from family_cases import save, tensors_of
from mcore_hfbridge.bridge import HFBridge

from mcore_core.config.kernel import kernel_config
from mcore_core.model.resolve import read_hf_config
from mcore_core.parallel.topology import Layout

LENGTHS = (9, 14)


def tokens_and_weights():
    """Return token ids and what the loss multiplies each logit by."""
    generator = torch.Generator().manual_seed(3)
    tokens_T = torch.randint(0, 101, (sum(LENGTHS),), generator=generator)
    return tokens_T, torch.randn(sum(LENGTHS), 101, generator=generator)


def logits_of(model, tokens_T):
    """Return transformers' logits, each sequence by itself."""
    parts = [model(part.unsqueeze(0)).logits[0] for part in tokens_T.split(LENGTHS)]
    return torch.cat(parts)


def gradients_of(model, case, folder):
    """Return HF-named gradients as they would lie in files: by saving them as weights."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
        for buffer in model.buffers():
            buffer.zero_()
    save(model, case, folder)
    return tensors_of(folder)


def build(folder, family, **sizes):
    """Return the bridge and this rank's chunks, at random; joins megatron's groups."""
    from mcore_core import compat
    from mcore_core.parallel.state import initialize
    from mcore_core.platform import install

    compat.apply()
    from mcore_core.model.build import build_chunks, decoder_config

    plan = plan_of(folder, family, **sizes)
    initialize(install(), plan.layout)
    config = decoder_config(plan, kernel_config(model=str(folder)), on_cpu=True)
    return HFBridge(family, plan.architecture), build_chunks(plan, config)


def plan_of(folder, family, **sizes):
    """Return what is built for the model in a folder."""
    from mcore_core.model.build import ModelPlan

    layout = Layout(**sizes)
    architecture = family.architecture(read_hf_config(folder))
    each = architecture.num_layers // layout.stages
    return ModelPlan(
        architecture=architecture,
        layout=layout,
        stage_layers=[each] * layout.stages,
        dtype=torch.float32,
        transformer_engine=False,
    )


def forward(chunk, tokens_T):
    """Return a chunk's logits of the packed row."""
    from mcore_core.model.packed import PackedRow

    cu = [0, LENGTHS[0], sum(LENGTHS)]
    row = PackedRow.build(cu, torch.cat([torch.arange(n) for n in LENGTHS]))
    return (chunk(tokens_T, row).squeeze(1) @ chunk.head_weight().T)[:, :101]


def to_gradients(chunks):
    """Put each parameter's gradient in the parameter's place, so that the bridge exports it."""
    with torch.no_grad():
        for chunk in chunks:
            for p in chunk.parameters():
                p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
            for name, buffer in chunk.named_buffers():
                if name.endswith("expert_bias"):
                    buffer.zero_()
