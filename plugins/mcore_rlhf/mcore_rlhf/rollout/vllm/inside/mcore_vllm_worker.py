"""Runs in vLLM's workers, in vLLM's own Python: takes weights, and says how likely tokens were.

vLLM knows it as `--worker-extension-cls mcore_vllm_worker.PolicyWorker`. It imports nothing of
mcore: the folder is on PYTHONPATH.

Shapes: N requests of a pass, V vocabulary.
"""

import inspect
from collections.abc import Iterable, Iterator
from typing import Any


class PolicyWorker:
    """Its methods are called on every worker through vLLM's `collective_rpc`."""

    model_runner: Any

    def mcore_prepare(self) -> dict[str, Any]:
        """Have log-probabilities under the temperature; return what the worker is.

        `logps` is "tempered" (log-softmax(logits / temperature), before top_k, top_p and penalties)
        or, where this vLLM's sampler is not known, "raw": the same at temperature 1.
        """
        runner = self.model_runner
        if not hasattr(self, "_mcore_tempered"):
            self._mcore_tempered = temper(getattr(runner, "sampler", None))
            self._mcore_version = -1
        return {
            "logps": "tempered" if self._mcore_tempered else "raw",
            "dtype": str(runner.model_config.dtype).replace("torch.", ""),
            "version": self._mcore_version,
        }

    def mcore_load(self, files: list[str], version: int) -> dict[str, Any]:
        """Load safetensors files in place of the weights, a tensor at a time."""
        return self.mcore_load_tensors(read(files), version)

    def mcore_load_tensors(
        self, tensors: Iterable[tuple[str, Any]], version: int
    ) -> dict[str, Any]:
        """Load tensors by their Hugging Face names; all of them are taken from the iterator."""
        counted, runner = Counted(tensors), self.model_runner
        model = runner.get_model() if hasattr(runner, "get_model") else runner.model
        own = model.load_weights
        loaded: set[str] = set()

        def load_weights(weights: Iterable[tuple[str, Any]]) -> Any:
            found = own(weights)
            loaded.update(found or ())
            return found

        model.load_weights = load_weights
        try:
            reload = getattr(runner, "reload_weights", None)
            if reload is not None and "weights_iterator" in inspect.signature(reload).parameters:
                reload(weights_iterator=iter(counted))
            else:
                model.load_weights(iter(counted))
        finally:
            del model.load_weights
        for _ in counted:
            pass
        repack(model)
        names = {name.replace(".base_layer.", ".") for name, _ in model.named_parameters()}
        self._mcore_version = version
        missing = sorted(names - loaded) if loaded else []
        return {"version": version, "tensors": counted.number, "missing": missing}

    def mcore_version(self) -> int:
        """Return the policy step of the weights; -1 where they are those of the start."""
        return int(getattr(self, "_mcore_version", -1))


class Counted:
    """Tensors, counted as they are taken; those for a worker are moved by vLLM's own loaders."""

    def __init__(self, tensors: Iterable[tuple[str, Any]]) -> None:
        self._tensors = iter(tensors)
        self.number = 0

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        for item in self._tensors:
            self.number += 1
            yield item


def read(files: list[str]) -> Iterator[tuple[str, Any]]:
    """Yield the tensors of safetensors files."""
    from safetensors import safe_open

    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no mapping
                yield name, opened.get_tensor(name)


def repack(model: Any) -> None:
    """Have layers that share another's weight see it anew.

    On the CPU a linear layer reads a packed copy of its weight. When an embedding that is the
    output layer too is loaded, vLLM 0.32 packs it for the embedding only: the output layer would go
    on with the first weights.
    """
    owners: dict[int, list[Any]] = {}
    for layer in model.modules():
        weight = layer._parameters.get("weight")
        if weight is not None:
            owners.setdefault(weight.data_ptr(), []).append(layer)
    for layers in owners.values():
        for layer in layers if len(layers) > 1 else ():
            if hasattr(layer, "cpu_linear"):
                layer.quant_method.process_weights_after_loading(layer)


def temper(sampler: Any) -> bool:
    """Have a sampler's raw log-probabilities divided by the temperature first; False: cannot.

    vLLM's own are either before the temperature or after top_k, top_p and penalties.
    """
    if not hasattr(sampler, "compute_logprobs") or not hasattr(sampler, "forward"):
        return False
    forward, plain = sampler.forward, sampler.compute_logprobs
    if "sampling_metadata" not in inspect.signature(forward).parameters:
        return False

    def tempered(logits: Any, sampling_metadata: Any, *args: Any, **kwargs: Any) -> Any:
        warmth_N = sampling_metadata.temperature

        def compute_logprobs(logits_NV: Any) -> Any:
            if warmth_N is None or len(warmth_N) != len(logits_NV):
                return plain(logits_NV)
            scale_N = warmth_N.float().where(warmth_N > 1e-5, warmth_N.new_ones(()).float())
            return plain(logits_NV.float() / scale_N.unsqueeze(1))

        sampler.compute_logprobs = compute_logprobs
        try:
            return forward(logits, sampling_metadata, *args, **kwargs)
        finally:
            sampler.compute_logprobs = plain

    sampler.forward = tempered
    return True
