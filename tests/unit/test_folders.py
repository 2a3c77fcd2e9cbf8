"""Which folder is a checkpoint, which is the newest, which go."""

import json

import pytest

from mcore_core.checkpoint import folders
from mcore_core.checkpoint.folders import clean, complete, find, require, retain
from mcore_core.errors import UsageError


def make(run, step, *, time=None, training=True):
    path = folders.final_path(run, step)
    (path / "mcore").mkdir(parents=True)
    (path / "mcore" / ".metadata").write_bytes(b"x")
    if training:
        content = {"step": step, "layout": "one rank"} | ({} if time is None else {"time": time})
        (path / "training.json").write_text(json.dumps(content))
    return path


def make_partial(run, step):
    path = folders.partial_path(run, step)
    (path / "mcore").mkdir(parents=True)
    (path / "training.json").write_text(json.dumps({"step": step}))
    return path


def names(run):
    return sorted(p.name for p in run.iterdir())


def test_names(tmp_path):
    assert folders.final_path(tmp_path, 100) == tmp_path / "checkpoint-100"
    assert folders.partial_path(tmp_path, 100) == tmp_path / ".partial-checkpoint-100"


def test_complete_is_ordered_by_step_not_by_name(tmp_path):
    for step in (100, 20, 3):
        make(tmp_path, step)
    make(tmp_path, 200, training=False)
    make_partial(tmp_path, 300)
    (tmp_path / "checkpoint-x").mkdir()
    (tmp_path / "checkpoint-5-merged").mkdir()
    assert [c.step for c in complete(tmp_path)] == [3, 20, 100]
    assert complete(tmp_path / "absent") == []
    last = complete(tmp_path)[-1]
    assert last.state == tmp_path / "checkpoint-100" / "mcore"
    assert last.training["layout"] == "one rank"


@pytest.mark.parametrize("text", ["", "{", '{"time": 3}'], ids=["empty", "cut", "no-step"])
def test_a_broken_training_json_is_no_checkpoint(tmp_path, text):
    path = make(tmp_path, 5, training=False)
    (path / "training.json").write_text(text)
    assert folders.read(path) is None
    assert find(tmp_path) is None


def test_find_takes_a_run_a_checkpoint_its_state_or_the_parent(tmp_path):
    run = tmp_path / "save"
    make(run, 10)
    newest = make(run, 20)
    older = run / "checkpoint-10"
    assert find(run).path == newest
    assert find(tmp_path).path == newest
    assert find(older).path == older
    assert find(older / "mcore").path == older
    assert find(newest / "mcore").step == 20
    assert find(tmp_path / "absent") is None
    file = tmp_path / "file"
    file.write_text("")
    assert find(file) is None


def test_of_several_runs_the_one_that_saved_last(tmp_path):
    make(tmp_path / "v0", 900, time=1000.0)
    make(tmp_path / "v1", 10, time=1999.0)
    newest = make(tmp_path / "v1", 20, time=2000.0)
    make(tmp_path / "v2", 5, training=False)
    assert find(tmp_path).path == newest


def test_a_partial_folder_is_never_found(tmp_path):
    """Not even with a training.json in it, which a kill just before the rename leaves."""
    make_partial(tmp_path, 50)
    assert complete(tmp_path) == []
    assert find(tmp_path) is None
    assert find(tmp_path.parent / tmp_path.name) is None
    done = make(tmp_path, 10)
    assert find(tmp_path).path == done
    assert require(tmp_path).path == done


def test_require_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UsageError) as caught:
        require(tmp_path / "run")
    assert str(caught.value) == (
        f"error[MC701]: --load {tmp_path}/run: no such folder\n"
        "  fix: give the run folder of an earlier run (its --save) or one of its checkpoint-N"
    )


FIX = (
    "  fix: give a folder that holds checkpoint-N with training.json, "
    "or --exit_on_missing_checkpoint false to start from the beginning"
)


def test_require_names_what_is_there(tmp_path):
    make_partial(tmp_path, 7)
    (tmp_path / "run.yaml").write_text("")
    with pytest.raises(UsageError) as caught:
        require(tmp_path)
    assert str(caught.value) == (
        f"error[MC702]: --load {tmp_path} holds no complete checkpoint\n"
        "  found: .partial-checkpoint-7, run.yaml\n"
        "  unfinished and not usable: .partial-checkpoint-7\n" + FIX
    )


def test_require_an_empty_folder_or_a_file(tmp_path):
    with pytest.raises(UsageError) as caught:
        require(tmp_path)
    assert str(caught.value) == (
        f"error[MC702]: --load {tmp_path} holds no complete checkpoint\n  found: nothing\n" + FIX
    )
    file = tmp_path / "weights.bin"
    file.write_text("")
    with pytest.raises(UsageError) as caught:
        require(file)
    assert str(caught.value).startswith(
        f"error[MC702]: --load {file} holds no complete checkpoint\n  found: nothing\n"
    )


def test_clean_removes_what_a_killed_run_left(tmp_path):
    make(tmp_path, 10)
    make(tmp_path, 20, training=False)
    make_partial(tmp_path, 30)
    (tmp_path / ".deleting-checkpoint-5" / "mcore").mkdir(parents=True)
    kept = ["checkpoint-10", "checkpoint-40", "metrics.jsonl", "runs"]
    (tmp_path / "checkpoint-40").mkdir()  # not ours: it has no training state
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "runs").mkdir()
    clean(tmp_path)
    assert names(tmp_path) == kept
    clean(tmp_path / "absent")


def test_retain_keeps_multiples_and_the_newest(tmp_path):
    for step in (5, 10, 15, 20, 25):
        make(tmp_path, step)
    make_partial(tmp_path, 30)
    assert retain(tmp_path, None) == []
    gone = retain(tmp_path, 10)
    assert gone == [tmp_path / "checkpoint-5", tmp_path / "checkpoint-15"]
    assert names(tmp_path) == [
        ".partial-checkpoint-30",
        "checkpoint-10",
        "checkpoint-20",
        "checkpoint-25",
    ]
    assert retain(tmp_path, 10) == []


def test_an_unfinished_checkpoint_is_not_the_newest_for_retention(tmp_path):
    make(tmp_path, 5)
    make(tmp_path, 7, training=False)
    assert retain(tmp_path, 10) == []
    assert names(tmp_path) == ["checkpoint-5", "checkpoint-7"]
