"""A reference with adapters of its own, beside a policy with others: as PEFT computes both."""

import json
import random
import warnings

import pytest
import torch
from commands import losses, metrics
from conftest import make_model
from test_kill import training_state

BETA, LR = 0.3, 0.5
ROWS = 8
RUN = [
    "--num_workers", "0", "--micro_batch_size", "2", "--global_batch_size", ROWS, "--beta", BETA,
    "--log_interval", "1", "--max_length", "96", "--optimizer", "sgd", "--sgd_momentum", "0",
    "--lr", LR, "--lr_decay_style", "constant", "--weight_decay", "0", "--clip_grad", "0",
]  # fmt: skip


@pytest.fixture(scope="module")
def rows(place):
    rng = random.Random(3)
    found = []
    for _ in range(ROWS):
        a, b = rng.randint(0, 99), rng.randint(0, 999)
        wrong = "".join(rng.choice("abcdef") for _ in range(rng.randint(1, 5)))
        found.append({"prompt": f"{a} + {b} = ?", "chosen": str(a + b), "rejected": wrong})
    file = place / "adapter_pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in found))
    return file


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT uses a name that transformers is to drop
        yield


def peft_adapter(model, folder, seed, **config):
    """An adapter of PEFT's with every matrix drawn; in a fork, for PEFT patches transformers."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tuned = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **config))
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    tuned.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.fixture(scope="module")
def adapters(model, place):
    """Of the reference and of the policy: other ranks, scales and modules."""
    theirs = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    mine = {"r": 5, "lora_alpha": 7, "target_modules": ["k_proj", "o_proj", "up_proj"]}
    return (
        peft_adapter(model, place / "reference_adapter", 1, **theirs),
        peft_adapter(model, place / "policy_adapter", 2, **mine),
    )


@pytest.fixture(scope="module")
def start(mcore, model, rows, tmp_path_factory):
    """Run dpo on the eight rows, all of them in each step."""

    def run(*options, ranks=1, code=0, before=None, steps=3):
        argv = ["run", "--plugin", "dpo", "--model", model, "--dataset", rows, *RUN]
        tuned = "--adapters" in options or "--tuner_type" in options
        argv += ["--lora_dropout", "0"] if tuned else []
        argv += ["--train_iters", steps, "--save", tmp_path_factory.mktemp("dpo"), *options]
        ran = mcore(*argv, before=before) if ranks == 1 else mcore.ranks(ranks, *argv)
        assert ran.code == code, ran.err
        return ran

    return run


def encoded(folder, rows):
    """Return ids and the place of the first answer token, all chosen and then all rejected."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    talks = [json.loads(line) for line in rows.read_text().splitlines()]
    for side in ("chosen", "rejected"):
        for talk in talks:
            prompt = f"<|im_start|>user\n{talk['prompt']}<|im_end|>\n<|im_start|>assistant\n"
            ids = tokenizer(f"{prompt}{talk[side]}<|im_end|>", return_tensors="pt").input_ids
            found.append((ids, len(tokenizer(prompt).input_ids)))
    return found


def sums(model, talks):
    """Summed log-probabilities of the answers, [2, P]."""
    found = []
    for ids, before in talks:
        values = model(ids).logits.log_softmax(-1)[0, :-1]
        found.append(values.gather(-1, ids[0, 1:, None])[before - 1 :].double().sum())
    return torch.stack(found).view(2, -1)


def with_peft(model, adapter):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if adapter is None:
        return base.eval()
    return PeftModel.from_pretrained(base, adapter, is_trainable=True).eval()


def by_peft(model, rows, reference, policy, steps=3):
    """DPO with plain SGD: the reference's sums, and of each step the loss and both rewards."""
    talks = encoded(model, rows)
    with torch.no_grad():
        ref_2P = sums(with_peft(model, reference), talks)
    tuned = with_peft(model, policy)
    trained = [p for p in tuned.parameters() if p.requires_grad]
    found = []
    for _ in range(steps):
        rewards_2P = BETA * (sums(tuned, talks) - ref_2P)
        loss = -torch.nn.functional.logsigmoid(rewards_2P[0] - rewards_2P[1]).mean()
        gradients = torch.autograd.grad(loss, trained)
        found.append((loss.item(), *rewards_2P.detach().mean(1).tolist()))
        with torch.no_grad():
            for parameter, gradient in zip(trained, gradients, strict=True):
                parameter -= LR * gradient
    return ref_2P, found


def reference_sums(run, scratch):
    """What a checkpoint says of the reference, [2, P] sorted by the chosen answers."""
    values = next(
        value
        for name, value in training_state(run, scratch).items()
        if name.endswith("reference.values")
    )
    return ordered(torch.as_tensor(values).T)


def ordered(sums_2P):
    return sums_2P[:, sums_2P[0].argsort()]


LAYOUTS = {
    "one": (1, []),
    "tp2": (2, ["--tensor_model_parallel_size", "2"]),
    "pp2": (2, ["--pipeline_model_parallel_size", "2"]),
    "cp2": (2, ["--context_parallel_size", "2"]),
    "dp2": (2, []),
}


@pytest.mark.parametrize(
    ("reference", "policy", "layout"),
    [
        *(("adapter", "lora", x) for x in LAYOUTS),
        *(("adapter", "full", x) for x in ("one", "tp2")),
        *(("off", "lora", x) for x in ("one", "pp2")),
    ],
)
def test_reference_and_policy_are_pefts(
    start, model, rows, adapters, tmp_path, reference, policy, layout
):
    """The sums of every answer, and loss and rewards of three steps, within 1e-5.

    off: the reference is the base alone, though the policy starts with an adapter.
    """
    mine = adapters[1] if policy == "lora" else None
    reference = adapters[0] if reference == "adapter" else None
    ref_2P, steps = by_peft(model, rows, reference, mine)
    own = ["--adapters", mine] if mine is not None else []
    ranks, options = LAYOUTS[layout]
    theirs = ["--ref_adapters", reference] if reference is not None else []
    run = start(*theirs, *own, *options, ranks=ranks).folder()
    found_2P = reference_sums(run / "checkpoint-3", tmp_path / "state")
    torch.testing.assert_close(found_2P, ordered(ref_2P), rtol=1e-5, atol=0)
    for line, (loss, chosen, rejected) in zip(metrics(run), steps, strict=True):
        assert line["loss"] == pytest.approx(loss, rel=1e-5)
        assert line["rewards/chosen"] == pytest.approx(chosen, rel=1e-5, abs=1e-5)
        assert line["rewards/rejected"] == pytest.approx(rejected, rel=1e-5, abs=1e-5)
    assert max(map(abs, steps[0][1:])) > 1e-3, steps  # the policy is not the reference
    assert len({loss for loss, *_ in steps}) == 3


OWN = ["--tuner_type", "lora", "--lora_rank", "6", "--target_modules", "q_proj", "o_proj"]
"""Of the policy: the reference's adapter has another rank and other modules."""


@pytest.fixture(scope="module")
def earlier(start, adapters):
    """Runs of adapters: with and without PEFT's files, and one that went on from an adapter."""
    fresh = ["--tuner_type", "lora", "--lora_rank", "4", "--target_modules", "v_proj", "up_proj"]
    kinds = {
        "fresh": fresh,
        "state alone": [*fresh, "--save_safetensors", "false"],
        "went on": ["--adapters", adapters[1], "--merge_lora", "true"],
    }
    return {name: start(*argv, steps=2).folder() for name, argv in kinds.items()}


@pytest.mark.parametrize("kind", ["fresh", "state alone", "went on"])
def test_adapters_of_a_run(start, earlier, kind):
    """--ref_adapter_load is what --ref_adapters with its checkpoint is, and the merged model."""
    run = earlier[kind]
    files = earlier["fresh" if kind == "state alone" else kind]  # the same weights
    loaded = start(*OWN, "--ref_adapter_load", run).folder()
    named = start(*OWN, "--ref_adapters", files / "checkpoint-2").folder()
    merged = start(*OWN, "--ref_model", files / "checkpoint-2-merged").folder()
    assert losses(loaded) == losses(named)
    assert losses(loaded) == pytest.approx(losses(merged), rel=1e-5)
    assert abs(metrics(loaded)[0]["rewards/margins"]) > 1e-3


def forget():
    """Have the reference asked again at each step."""
    from mcore_rlhf.reference import ReferenceScores

    once = ReferenceScores.__call__

    def each_time(self, units, run):
        self._known.clear()
        return once(self, units, run)

    ReferenceScores.__call__ = each_time


@pytest.mark.parametrize("reference", ["off", "adapters"])
def test_sums_kept_are_sums_computed_again(start, adapters, reference):
    """To the last bit, in the second and the third pass over the data."""
    options = [*OWN, "--train_dataloader_shuffle", "false"]
    options += ["--ref_adapters", adapters[0]] if reference == "adapters" else []
    kept, again = (start(*options, before=before).folder() for before in (None, forget))
    assert losses(kept) == losses(again)
    assert len(set(losses(kept).values())) == 3


def test_a_resumed_run_with_another_reference_asks_that_one(start, model, rows, adapters, tmp_path):
    first = start(*OWN, "--ref_adapters", adapters[0], steps=2).folder()
    for number, reference in enumerate(adapters):
        run = start(*OWN, "--ref_adapters", reference, "--load", first).folder()
        with torch.no_grad():
            wanted_2P = sums(with_peft(model, reference), encoded(model, rows))
        found_2P = reference_sums(run / "checkpoint-3", tmp_path / f"state{number}")
        torch.testing.assert_close(found_2P, ordered(wanted_2P), rtol=1e-5, atol=0)


@pytest.fixture(scope="module")
def places(place, model, adapters, earlier, start):
    """Folders that messages name."""
    nothing = place / "nothing"
    nothing.mkdir()
    dora = peft_adapter(model, place / "dora", 4, r=2, target_modules=["q_proj"], use_dora=True)
    wider = make_model(place / "wider", hidden_size=64)
    return {
        "model": model,
        "nothing": nothing,
        "first": adapters[0],
        "second": adapters[1],
        "dora": dora,
        "wider": peft_adapter(wider, place / "wide", 5, r=2, target_modules=["o_proj"]),
        "lora_run": earlier["fresh"],
        "full_run": start(steps=1).folder(),
    }


FIX_RUN = "  fix: give the run folder of an earlier run (its --save) or one of its checkpoint-N\n"
FIX_ADAPTER = (
    "  fix: give a folder that PEFT's save_pretrained wrote, or a checkpoint-N of a LoRA run\n"
)
BAD = {
    "no such folder": (
        ["--ref_adapters", "{nothing}/x"],
        "error[MC550]: --ref_adapters {nothing}/x: no adapter_config.json there\n"
        "  found: nothing\n" + FIX_ADAPTER,
    ),
    "a model": (
        ["--ref_adapters", "{model}"],
        "error[MC550]: --ref_adapters {model}: no adapter_config.json there\n"
        "  found: chat_template.jinja, config.json, generation_config.json, model.safetensors, "
        "tokenizer.json, tokenizer_config.json\n" + FIX_ADAPTER,
    ),
    "two": (
        ["--ref_adapters", "{first}", "{second}"],
        "error[MC553]: --ref_adapters {first} {second}: a model has one adapter at a time\n"
        "  fix: merge the first with mcore export --merge_lora true, as --ref_model\n",
    ),
    "of another kind": (
        ["--ref_adapters", "{dora}"],
        "error[MC552]: {dora}/adapter_config.json: use_dora is True, which adapters here do not "
        "have\n"
        "  fix: merge it into its model with PEFT (merge_and_unload) and train from there\n",
    ),
    "of another model": (
        ["--ref_adapters", "{wider}"],
        "error[MC555]: the adapter in {wider} does not fit --ref_model {model}\n",
    ),
    "no such run": (
        ["--ref_adapter_load", "{nothing}/x"],
        "error[MC701]: --ref_adapter_load {nothing}/x: no such folder\n" + FIX_RUN,
    ),
    "no run": (
        ["--ref_load", "{nothing}"],
        "error[MC702]: --ref_load {nothing} holds no complete checkpoint\n"
        "  found: nothing\n"
        "  fix: give a folder that holds checkpoint-N with training.json\n",
    ),
    "a run without adapters": (
        ["--ref_adapter_load", "{full_run}"],
        "error[MC707]: --ref_adapter_load {full_run}: {full_run}/checkpoint-1 is of a run that "
        "trained all weights, and no adapters\n"
        "  fix: --ref_load {full_run}\n",
    ),
    "a run of adapters": (
        ["--ref_load", "{lora_run}"],
        "error[MC707]: --ref_load {lora_run}: {lora_run}/checkpoint-2 is of a run that trained "
        "adapters alone\n"
        "  fix: --ref_adapter_load {lora_run}\n",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes(start, places, name):
    argv, text = BAD[name]
    ran = start(*[a.format(**places) for a in argv], code=2)
    assert text.format(**places) in ran.err
    assert "Traceback" not in ran.err
    assert ran.err.count("error[") == 1
