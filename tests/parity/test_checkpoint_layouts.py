"""A saved run goes on as if it had not stopped: the same bits in its layout, the same in others."""

import json
import math
import shutil

import pytest
import torch
from sft_case import ADAM, LAYOUTS, SGD, sft_case

from mcore_core.checkpoint import folders
from mcore_core.checkpoint.load import load
from mcore_core.checkpoint.save import Contents, Saver
from mcore_core.config.checkpoint import CheckpointConfig
from mcore_core.errors import UsageError
from mcore_core.testing.cases import RankRun, Session, assert_same, combine
from mcore_core.testing.ranks import fork_ranks

SHARDED = {**ADAM, "use_distributed_optimizer": True}
STEPS, AT = 6, 3


def _case(shape="qk-norm", **options):
    return sft_case(shape, STEPS, **(options or SHARDED))


def _save(session, folder, seen, **options):
    saver = Saver(folder, CheckpointConfig(**options), lambda *a: seen.append(a))
    layout = session.layout
    training = {
        "layout": str(layout),
        "world": layout.world,
        "has_optimizer": not options.get("no_save_optim", False),
    }
    contents = Contents(AT, training, {"cursor": [1, 2]}, None)
    saver.save(session.trainable, contents)
    return saver


def _uninterrupted(case, layout, folder, **options):
    """Save after three steps and train on; return the whole run's second half."""

    def one_rank(_):
        session, seen = Session(case, layout), []
        session.train(AT)
        saver = _save(session, folder, seen, **options)
        saved_at_once = len(seen)
        results = session.train(STEPS - AT)
        saver.close()
        assert len(seen) == 1
        assert seen[0][:2] == (AT, folder / f"checkpoint-{AT}")
        return saved_at_once, RankRun(results, [], session.weights())

    ranks = fork_ranks(one_rank, layout.world)
    assert {n for n, _ in ranks} == {0 if options.get("async_save") else 1}
    assert [p.name for p in folder.iterdir()] == [f"checkpoint-{AT}"]
    return combine([run for _, run in ranks])


def _resume(case, layout, folder, **options):
    """Load into a model of zeros and train three more steps."""

    def one_rank(_):
        session = Session(case, layout, seed=7)
        with torch.no_grad():
            for chunk in session.chunks:
                for parameter in chunk.parameters():
                    parameter.zero_()
        checkpoint = folders.require(folder)
        loaded = load(session.trainable, checkpoint, CheckpointConfig(**options))
        session.step = checkpoint.step
        session.schedule.step(checkpoint.step)
        assert loaded.common == {"cursor": [1, 2]}
        results = session.train(STEPS - AT)
        return (loaded.optimizer, loaded.rng), RankRun(results, [], session.weights())

    ranks = fork_ranks(one_rank, layout.world)
    assert len({flags for flags, _ in ranks}) == 1
    return ranks[0][0], combine([run for _, run in ranks])


def _same_bits(run, reference):
    numbers = [[(r.loss, r.grad_norm, r.lr, r.tokens) for r in x.results] for x in (run, reference)]
    assert numbers[0] == numbers[1]
    assert run.weights.keys() == reference.weights.keys()
    for key, weight in reference.weights.items():
        assert torch.equal(run.weights[key], weight), key


OVERLAPPED = {**SHARDED, "overlap_grad_reduce": True, "overlap_param_gather": True}
CONSTANT = {"ckpt_assume_constant_structure": True}
ASYNC = {"async_save": True}


@pytest.mark.parametrize(
    ("layout", "shape", "options", "saving"),
    [
        pytest.param("tp2-sp", "qk-norm", SHARDED, {}, id="tp2-sp"),
        pytest.param("dp2", "qk-norm", SHARDED, ASYNC, id="dp2-async"),
        pytest.param("dp2", "qk-norm", OVERLAPPED, {}, id="dp2-overlap"),
        pytest.param("tp2", "dropout", SHARDED, {}, id="tp2-dropout"),
        pytest.param("pp2", "dropout", SGD, CONSTANT, id="pp2-dropout-sgd"),
        pytest.param("pp2", "tied", SHARDED, {}, id="pp2-tied"),
        pytest.param("pp2-dp2", "tied", SHARDED, {}, id="pp2-dp2-tied", marks=pytest.mark.parity),
        pytest.param("one", "tied", SHARDED, {}, id="one-tied", marks=pytest.mark.parity),
        pytest.param(
            "pp2-vpp2", "qkv-bias", ADAM, ASYNC, id="pp2-vpp2-async", marks=pytest.mark.parity
        ),
        pytest.param(
            "tp2-pp2-cp2", "dropout", OVERLAPPED, ASYNC, id="8-ranks", marks=pytest.mark.parity
        ),
    ],
)
def test_same_layout_resumes_bit_for_bit(tmp_path, layout, shape, options, saving):
    case = _case(shape, **options)
    reference = _uninterrupted(case, LAYOUTS[layout], tmp_path, **saving)
    flags, run = _resume(case, LAYOUTS[layout], tmp_path)
    assert flags == (True, True)
    _same_bits(run, reference)


@pytest.mark.parity
def test_the_optimizer_patch_is_needed(tmp_path, monkeypatch):
    """Tied embeddings have a bucket of their own under PP, which megatron-core saves displaced."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer as Optimizer

    original = Optimizer.get_parameter_state_dp_zero.__wrapped__
    monkeypatch.setattr(Optimizer, "get_parameter_state_dp_zero", original)
    case = _case("tied")
    reference = _uninterrupted(case, LAYOUTS["pp2"], tmp_path)
    _, run = _resume(case, LAYOUTS["pp2"], tmp_path)
    assert run.losses != reference.losses, "mcore_core.compat.optimizer_buckets can go"


def test_dropout_without_its_random_state_differs(tmp_path):
    """The bit-for-bit test above depends on the restored random states."""
    case = _case("dropout")
    reference = _uninterrupted(case, LAYOUTS["one"], tmp_path)
    flags, run = _resume(case, LAYOUTS["one"], tmp_path, no_load_rng=True)
    assert flags == (True, False)
    assert run.losses != reference.losses


@pytest.fixture(scope="module", params=["qk-norm", pytest.param("tied", marks=pytest.mark.parity)])
def saved_at_tp2(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    case = _case(request.param)
    return case, folder, _uninterrupted(case, LAYOUTS["tp2"], folder)


@pytest.mark.parametrize("layout", ["one", "pp2"])
def test_saved_at_tp2_resumes_elsewhere(saved_at_tp2, layout):
    case, folder, reference = saved_at_tp2
    flags, run = _resume(case, LAYOUTS[layout], folder)
    assert flags == (True, False)  # random states belong to a layout
    for a, b in zip(run.results, reference.results, strict=True):
        assert math.isclose(a.loss, b.loss, rel_tol=1e-6), (a.loss, b.loss)
    assert_same(run, reference, relative=1e-5)


@pytest.mark.parity
@pytest.mark.parametrize(
    "layout",
    ["tp2-sp", "pp2-vpp2", "dp2", "cp2", "tp4", "tp2-pp2-sp", "tp2-dp2", "tp2-pp2-cp2"],
)
def test_reshard_grid(saved_at_tp2, layout):
    case, folder, reference = saved_at_tp2
    _, run = _resume(case, LAYOUTS[layout], folder)
    for a, b in zip(run.results, reference.results, strict=True):
        assert math.isclose(a.loss, b.loss, rel_tol=1e-6), (a.loss, b.loss)
    assert_same(run, reference, relative=1e-5)


def test_training_json_is_written_last_and_tells_the_step(tmp_path):
    case = sft_case(steps=STEPS, **SHARDED)
    _uninterrupted(case, LAYOUTS["one"], tmp_path)
    folder = tmp_path / f"checkpoint-{AT}"
    training = json.loads((folder / "training.json").read_text())
    assert (training["step"], training["layout"], training["world"]) == (AT, "one rank", 1)
    assert training["time"] > 1.7e9
    newest = max(folder.rglob("*"), key=lambda p: p.stat().st_mtime_ns * p.is_file())
    assert newest.name == "training.json"


def _save_once(case, folder, **saving):
    """Save after one step, on one rank; return the weights."""

    def one_rank(_):
        session = Session(case, LAYOUTS["one"])
        session.train(1)
        _save(session, folder, [], **saving)
        return session.weights()

    return fork_ranks(one_rank, 1)[0]


def test_finetune_takes_the_weights_only(tmp_path):
    case = sft_case(steps=STEPS, **SHARDED)
    saved = [part.value for part in _save_once(case, tmp_path)]

    def one_rank(_):
        fresh = Session(case, LAYOUTS["one"])
        loaded = load(fresh.trainable, folders.require(tmp_path), CheckpointConfig(finetune=True))
        same = all(
            torch.equal(part.value, value)
            for part, value in zip(fresh.weights(), saved, strict=True)
        )
        first = fresh.optimizer.param_groups[0].get("step", 0)
        # the optimizer must step from the loaded weights, not from those it was built with
        fresh.train(1)
        moved = max(
            float((part.value - value).abs().max())
            for part, value in zip(fresh.weights(), saved, strict=True)
        )
        return [same, loaded.optimizer, loaded.rng, first], moved

    ((flags, moved),) = fork_ranks(one_rank, 1)
    assert flags == [True, False, False, 0]
    assert 0 < moved < 0.0103  # a step of Adam is at most lr 0.01, beside the decay


def _refusal(folder, loading=None, shape="qk-norm"):
    """Return what loading the checkpoint in a folder says."""

    def one_rank(_):
        fresh = Session(sft_case(shape, STEPS, **SHARDED), LAYOUTS["one"])
        try:
            load(fresh.trainable, folders.require(folder), CheckpointConfig(**(loading or {})))
        except UsageError as error:
            return str(error)
        return "loaded"

    return fork_ranks(one_rank, 1)[0]


@pytest.fixture(scope="module")
def without_optimizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("no_save_optim")
    _save_once(sft_case(steps=STEPS, **SHARDED), folder, no_save_optim=True)
    return folder


def test_no_optimizer_in_the_checkpoint(without_optimizer):
    assert _refusal(without_optimizer) == (
        f"error[MC704]: {without_optimizer}/checkpoint-3 was saved with --no_save_optim: training "
        "cannot resume exactly\n"
        "  fix: --no_load_optim starts with a fresh optimizer, --finetune also at step 0"
    )


@pytest.mark.parametrize("flag", ["no_load_optim", "finetune"])
def test_no_optimizer_is_needed_where_none_is_loaded(without_optimizer, flag):
    assert _refusal(without_optimizer, {flag: True}) == "loaded"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    _save_once(sft_case(steps=STEPS, **SHARDED), folder)
    return folder


def test_a_checkpoint_of_another_model(saved):
    message = _refusal(saved, shape="layernorm-window-sinks")
    assert message.startswith(f"error[MC705]: {saved}/checkpoint-3 ")
    assert "\n  fix: load " in message
    assert len(message) < 700


@pytest.mark.parametrize("how", ["empty metadata", "no metadata", "truncated", "missing"])
def test_a_damaged_state_file(tmp_path, saved, how):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    state = tmp_path / "checkpoint-3" / "mcore"
    largest = max(state.glob("*.distcp"), key=lambda p: p.stat().st_size)
    match how:
        case "empty metadata":
            (state / ".metadata").write_bytes(b"")
        case "no metadata":
            (state / ".metadata").unlink()
        case "truncated":
            with largest.open("r+b") as file:
                file.truncate(largest.stat().st_size // 2)
        case "missing":
            largest.unlink()
    lines = _refusal(tmp_path).splitlines()
    assert lines[0] == f"error[MC705]: {tmp_path}/checkpoint-3 cannot be loaded"
    assert len(lines[1]) < 310
    assert lines[2:] == [
        "  fix: load another checkpoint; --no_load_optim if only the optimizer is damaged"
    ]
