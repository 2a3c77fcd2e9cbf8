"""Adapters on a family's tiny model: ours in this process, and PEFT's on transformers' model."""

import torch
from family_cases import VOCAB, family_of
from family_runs import build, forward, logits_of

LEARNING_RATE = 0.01


def open_model(folder, case, sizes=None, **options):
    """Return bridge, tuner and chunks of a model with adapters; joins megatron's groups."""
    family = family_of(case)
    bridge, chunks = build(folder, family, **(sizes or {}))
    from mcore_sft.tuners.lora.tuner import Lora

    from mcore_core.config.kernel import kernel_config
    from mcore_core.protocols import TunerContext

    if "adapters" not in options:
        options = {"lora_rank": 3, "lora_alpha": 5, **options}
    given = {"lora_dropout": 0.0, **options}
    config = kernel_config(model=str(folder), tuner_type="lora", **given)
    context = TunerContext(
        config=config, family=family, architecture=bridge.architecture, bridge=bridge
    )
    tuner = Lora(context)
    tuner.apply(chunks)
    bridge.load(chunks, folder)
    tuner.load(chunks)
    return bridge, tuner, chunks


def draw_adapters(tuner, seed=5):
    """Draw every matrix, B too, on one rank."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for adapter in tuner.adapters:
            for pair in adapter.pairs:
                pair.a.normal_(std=0.3)
                pair.b.normal_(std=0.3)
                if pair.projection.kind == "embedding":
                    pair.a[VOCAB:] = 0
                elif pair.projection.entry.rule.pad:
                    pair.b[VOCAB:] = 0


def steps_of(parameters, logits, out_TV, count=3):
    """Take AdamW steps on a fixed loss; return the losses and the first gradients."""
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, eps=1e-3, weight_decay=0.01)
    losses, gradients = [], []
    for _ in range(count):
        loss = (logits() * out_TV).mean()
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        if not gradients:
            gradients = [p.grad.clone() for p in parameters]
        optimizer.step()
    return losses, gradients


def put(parameters, values):
    with torch.no_grad():
        for p, value in zip(parameters, values, strict=True):
            p.copy_(value)


def trained(chunks):
    return [p for chunk in chunks for p in chunk.parameters() if p.requires_grad]


def ours(folder, case, out, tokens_T, **options):
    """Return logits with and without adapters; write the adapter and the merged model."""
    bridge, tuner, chunks = open_model(folder, case, **options)
    if "adapters" not in options:
        draw_adapters(tuner)
    (chunk,) = chunks
    chunk.eval()
    with torch.no_grad():
        logits_TV = forward(chunk, tokens_T)
        with tuner.disabled(chunks):
            plain_TV = forward(chunk, tokens_T)
        again_TV = forward(chunk, tokens_T)
    assert torch.equal(again_TV, logits_TV)
    tuner.export(chunks, out / "adapter")
    if tuner.mergeable:
        bridge.save(
            chunks,
            out / "merged",
            max_shard_size=2**30,
            source=folder,
            weights=tuner.merged(chunks),
        )
    return logits_TV, plain_TV


def trained_by_us(folder, case, out, tokens_T, out_TV, **options):
    """Return the losses of three steps; write first gradients and the adapter after them."""
    _, tuner, chunks = open_model(folder, case, **options)
    (chunk,) = chunks
    parameters = trained(chunks)
    losses, gradients = steps_of(parameters, lambda: forward(chunk, tokens_T), out_TV)
    tuner.export(chunks, out / "trained")
    put(parameters, gradients)
    tuner.export(chunks, out / "gradients")
    return losses


def base_model(folder, case):
    """Return transformers' model, under transformers' name for the family."""
    import json

    from transformers import AutoConfig, AutoModelForCausalLM

    found = json.loads((folder / "config.json").read_text()) | {"model_type": case.model_type}
    config = AutoConfig.for_model(**found)
    config._experts_implementation = "eager"
    return AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float32, attn_implementation="eager"
    )


def peft_model(folder, case, adapter, *, trainable=False):
    from peft import PeftModel

    model = base_model(folder, case)
    return PeftModel.from_pretrained(model, adapter, is_trainable=trainable)


def peft_logits(model, tokens_T):
    with torch.no_grad():
        return logits_of(model.eval(), tokens_T)


def peft_names(model):
    """Return PEFT's trainable parameters by their names in its files."""
    found = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            plain = name.replace(".modules_to_save.default.", ".").replace(".default", "")
            found[plain] = p
    return found
