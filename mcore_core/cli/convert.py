"""What `mcore export` does: one model through megatron-core, written for one side or the other."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcore_core.config.checkpoint import CheckpointConfig
from mcore_core.config.export import ExportConfig
from mcore_core.config.train import TrainConfig
from mcore_core.config.weights import WeightsConfig
from mcore_core.errors import usage_error
from mcore_core.model.hf_head import write_head
from mcore_core.model.resolve import read_hf_config
from mcore_core.model.weight_files import copy_beside

if TYPE_CHECKING:
    from mcore_core.checkpoint.folders import Checkpoint
    from mcore_core.cli.prepared import PreparedExport
    from mcore_core.model.build import ModelPlan
    from mcore_core.platform.base import Platform
    from mcore_core.protocols import Tuner
    from mcore_core.train.plan import ModelSource


def convert(prepared: "PreparedExport") -> None:
    """Load `--load` or `--model`, and write `--save`; collective."""
    from mcore_core.cli.execute import begin  # noqa: PLC0415  (it imports this module)

    config = prepared.config
    target = Path(config[CheckpointConfig].save or "").expanduser()
    _check_target(target, exist_ok=config[ExportConfig].exist_ok)
    trained = _trained_folder(prepared)
    prepared = _with_model(_with_adapter(prepared))
    source = _source(prepared, trained)
    platform = begin(prepared, source)
    from mcore_core.parallel.state import shut_down  # noqa: PLC0415
    from mcore_core.train.build import build_model, model_plan  # noqa: PLC0415
    from mcore_core.train.session import bridge_of  # noqa: PLC0415

    source, tokenizer = _with_tokens(prepared, source, trained)
    plan = model_plan(source, prepared.config, platform, max_length=None)
    chunks = build_model(plan, prepared.config, on_cpu=platform.name == "cpu", initialize=False)
    bridge = bridge_of(prepared)(source.family, source.architecture)
    tuner = _tuner(prepared, source, bridge)
    tuner.apply(chunks)
    _load(prepared, source, chunks, bridge)
    tuner.load(chunks)
    if tuner.partial and prepared.config[WeightsConfig].merge_lora:
        tuner.absorb(chunks)
    elif tuner.partial:
        _write_adapter(prepared, source, chunks, tuner, target, tokenizer=tokenizer)
        _say(f"wrote {target}")
        shut_down()
        return
    if config[ExportConfig].to_hf:
        bridge.save(
            chunks,
            target,
            max_shard_size=config[WeightsConfig].max_shard_bytes,
            source=source.path,
            config=_config_changes(source),
        )
        _write_tokenizer(target, tokenizer)
    else:
        _save_state(prepared, source, chunks, target, tokenizer=tokenizer)
    _say(f"wrote {target}")
    if config[ExportConfig].test_convert_precision:
        if config[ExportConfig].to_mcore:
            _reload(prepared, source, chunks, target)
        folder = target if config[ExportConfig].to_hf else source.path
        _test_precision(prepared, chunks, plan, folder, platform)
    shut_down()


def _tuner(prepared: "PreparedExport", source: "ModelSource", bridge: Any) -> "Tuner":  # noqa: ANN401
    from mcore_core.protocols import TunerContext  # noqa: PLC0415
    from mcore_core.train.tuning import build_tuner  # noqa: PLC0415  (megatron)

    context = TunerContext(
        config=prepared.config,
        family=source.family,
        architecture=source.architecture,
        bridge=bridge,
    )
    return build_tuner(prepared.manager.catalogue("mcore_tuners"), context)


def _write_adapter(
    prepared: "PreparedExport",
    source: "ModelSource",
    chunks: list[Any],
    tuner: "Tuner",
    target: Path,
    *,
    tokenizer: Any,  # noqa: ANN401
) -> None:
    """Write the adapter alone, in PEFT's format or as a checkpoint for `--adapter_load`."""
    if prepared.config[ExportConfig].to_hf:
        tuner.export(chunks, target)
        _write_tokenizer(target, tokenizer)
    else:
        _save_state(prepared, source, chunks, target, tuner=tuner, tokenizer=tokenizer)


def _with_adapter(prepared: "PreparedExport") -> "PreparedExport":
    """Where `--load` is a checkpoint of adapters, take its PEFT adapter and the model it is for."""
    from mcore_core.checkpoint import folders  # noqa: PLC0415

    config = prepared.config
    if config[WeightsConfig].adapters and config[WeightsConfig].merge_lora is None:
        return replace(prepared, config=config.replace(merge_lora=True))
    load = config[CheckpointConfig].load
    if load is None:
        return prepared
    checkpoint = folders.require(Path(load).expanduser())
    trained = checkpoint.training.get("tuner", {})
    if trained.get("tuner_type", "full") == "full":
        return prepared
    path = checkpoint.path / folders.ADAPTER
    if not path.is_file():
        raise usage_error(
            "MC558",
            f"{checkpoint.path} holds no model: its run trained {trained['tuner_type']} adapters",
            "fix: --adapters with the adapter in PEFT's format, and --model",
        )
    base = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    merge = config[WeightsConfig].merge_lora
    changed = config.replace(
        load=None,
        model=config[WeightsConfig].model or base,
        adapters=[str(checkpoint.path)],
        tuner_type=trained["tuner_type"],
        merge_lora=True if merge is None else merge,
    )
    return replace(prepared, config=changed)


def _reload(
    prepared: "PreparedExport", source: "ModelSource", chunks: list[Any], target: Path
) -> None:
    """Forget the weights and read them back from what was written."""
    import torch  # noqa: PLC0415

    with torch.no_grad():
        for chunk in chunks:
            for weight in chunk.parameters():
                weight.fill_(float("nan"))
    _load(replace(prepared, config=prepared.config.replace(load=str(target))), source, chunks, None)


def _test_precision(
    prepared: "PreparedExport",
    chunks: list[Any],
    plan: "ModelPlan",
    folder: Path,
    platform: "Platform",
) -> None:
    """Compare with transformers and print the table. Raises RunFailure where they differ."""
    from mcore_core.train import precision  # noqa: PLC0415  (megatron)

    options = prepared.config[ExportConfig]
    report = precision.measure(
        chunks,
        plan,
        folder,
        platform.device(),
        dtype=options.test_convert_dtype,
        device_map=options.device_map,
    )
    _say(report.table())
    sys.stdout.flush()
    precision.require(report)


def _trained_folder(prepared: "PreparedExport") -> "Checkpoint | None":
    """Return the checkpoint of a run that is exported, also where it is named as an adapter."""
    from mcore_core.checkpoint import folders  # noqa: PLC0415

    load = prepared.config[CheckpointConfig].load
    if load is not None:
        path = Path(load).expanduser()
        if folders.find(path) is None and (path / "config.json").is_file():
            raise usage_error(
                "MC702",
                f"--load {path} holds a model, and no checkpoint of a run",
                f"fix: --model {path}, which takes Hugging Face models",
            )
        return folders.require(path, restart=False)
    given = prepared.config[WeightsConfig].adapters
    return folders.find(Path(given[0]).expanduser()) if given else None


def _source(prepared: "PreparedExport", trained: "Checkpoint | None") -> "ModelSource":
    """Return the model with the head and the vocabulary that the checkpoint was trained with."""
    import dataclasses  # noqa: PLC0415

    from mcore_core.cli.execute import source_of  # noqa: PLC0415  (it imports this module)
    from mcore_core.data.new_tokens import Growth  # noqa: PLC0415

    source = source_of(prepared)
    shape: dict[str, Any] = {} if trained is None else trained.training.get("architecture", {})
    if prepared.config[CheckpointConfig].load is not None:
        changes = {k: shape[k] for k in ("head", "scores", "mtp_layers") if k in shape}
        architecture = dataclasses.replace(source.architecture, **changes)
        source = dataclasses.replace(source, architecture=architecture)
    rows, more = source.architecture.vocab_size, shape.get("vocab_size", 0)
    return source.grown(Growth(rows, rows, rows, more)) if more > rows else source


def _with_tokens(
    prepared: "PreparedExport", source: "ModelSource", trained: "Checkpoint | None"
) -> "tuple[ModelSource, Any]":
    """Return the model with the new tokens, and the tokenizer that has them; None: as it is."""
    from mcore_core.train.tokenizer import load_tokenizer, with_new_tokens  # noqa: PLC0415

    if source.growth is not None:
        assert trained is not None
        return source, load_tokenizer(trained.path)
    if not prepared.config[TrainConfig].new_special_tokens:
        return source, None
    tokenizer = load_tokenizer(source.path)
    return with_new_tokens(source, prepared.config, tokenizer), tokenizer


def _write_tokenizer(target: Path, tokenizer: Any) -> None:  # noqa: ANN401
    from mcore_core.train.exports import write_tokenizer  # noqa: PLC0415

    if tokenizer is not None and _is_main():
        write_tokenizer(target, tokenizer)


def _config_changes(source: "ModelSource") -> dict[str, Any]:
    changes = write_head(source.architecture, source.hf_config)
    return changes if source.growth is None else changes | {"vocab_size": source.growth.rows}


def _with_model(prepared: "PreparedExport") -> "PreparedExport":
    """Take the model's config from the checkpoint where `--model` was not given."""
    from mcore_core.checkpoint import folders  # noqa: PLC0415

    config = prepared.config
    if config[WeightsConfig].model is not None:
        return prepared
    checkpoint = folders.require(Path(config[CheckpointConfig].load or "").expanduser())
    if not (checkpoint.path / "config.json").is_file():
        raise usage_error(
            "MC517",
            f"{checkpoint.path} has no config.json: it was saved with --save_safetensors false",
            "fix: --model with the model that the run was started from",
        )
    return replace(prepared, config=config.replace(model=str(checkpoint.path)))


def _load(
    prepared: "PreparedExport",
    source: "ModelSource",
    chunks: list[Any],
    bridge: Any,  # noqa: ANN401
) -> None:
    options = prepared.config[CheckpointConfig]
    if options.load is None:
        from mcore_core.train.grow import load_weights  # noqa: PLC0415  (megatron)

        load_weights(chunks, source, type(bridge))
        return
    from mcore_core.checkpoint import folders  # noqa: PLC0415  (megatron)
    from mcore_core.checkpoint.load import load  # noqa: PLC0415
    from mcore_core.checkpoint.state import Trainable  # noqa: PLC0415

    checkpoint = folders.require(Path(options.load).expanduser())
    weights_only = options.model_copy(update={"finetune": True})
    load(Trainable(chunks, None, source.layout), checkpoint, weights_only)


def _save_state(
    prepared: "PreparedExport",
    source: "ModelSource",
    chunks: list[Any],
    target: Path,
    *,
    tuner: "Tuner | None" = None,
    tokenizer: Any = None,  # noqa: ANN401
) -> None:
    """Write a checkpoint of the model, or of what a tuner has added to it."""
    from mcore_core.checkpoint.save import Contents, Saver  # noqa: PLC0415  (megatron)
    from mcore_core.checkpoint.state import Trainable  # noqa: PLC0415
    from mcore_core.train.session import plain_architecture  # noqa: PLC0415

    options = prepared.config[CheckpointConfig].model_copy(
        update={"no_save_optim": True, "no_save_rng": True, "async_save": False}
    )
    saver = Saver(target, options, lambda step, path, seconds: None)
    training = {
        "layout": str(source.layout),
        "world": source.layout.world,
        "architecture": plain_architecture(source),
        "has_optimizer": False,
        "has_rng": False,
        **({"tuner": tuner.identity()} if tuner else {}),
    }

    def copy_config(folder: Path) -> None:
        if _is_main():
            shutil.copyfile(source.path / "config.json", folder / "config.json")
            copy_beside(source.path, folder)
        if _is_main() and source.growth is not None:
            config = read_hf_config(folder) | {"vocab_size": source.growth.rows}
            (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        _write_tokenizer(folder, tokenizer)

    contents = Contents(step=0, training=training, common={}, write_model=copy_config)
    saver.save(Trainable(chunks, None, source.layout, partial=tuner is not None), contents)


def _check_target(target: Path, *, exist_ok: bool) -> None:
    from mcore_core.train.folders import writable  # noqa: PLC0415  (imports the parts of a run)

    with writable(target, "--save"):
        target.mkdir(parents=True, exist_ok=True)
        filled = any(target.iterdir())
    if filled and not exist_ok:
        raise usage_error(
            "MC518",
            f"--save {target} is not empty",
            "fix: another folder, or --exist_ok to write into this one",
        )


def _is_main() -> bool:
    import torch.distributed as dist  # noqa: PLC0415

    return dist.get_rank() == 0


def _say(text: str) -> None:
    if _is_main():
        sys.stdout.write(text + "\n")
