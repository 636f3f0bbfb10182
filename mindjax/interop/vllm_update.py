"""New weights into a running vLLM, in place: no restart, and nothing of the old weights left in its caches."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from mindjax.config import ModelConfig
from mindjax.interop.torch_exchange import to_torch
from mindjax.models import hf_weights

# Given to `LLM(worker_extension_cls=...)` where workers live in processes of their own.
WORKER_EXTENSION = "mindjax.interop.vllm_update.WorkerExtension"
SHARED_MEMORY = Path("/dev/shm")

Weights = Iterable[tuple[str, torch.Tensor]]


def update_weights(llm: Any, config: ModelConfig, params: Any) -> None:
    """Replaces the weights of a running engine by `params`; the next request is answered by them alone.

    With the engine in this process the workers read the arrays where they lie; with workers in other processes they
    go through a folder in shared memory. vLLM casts them to its own dtype.

    Args:
      llm: a `vllm.LLM` that was started on a model of this config and has no request in progress; with workers in
        other processes, started with `worker_extension_cls=WORKER_EXTENSION`.
      config: of the model.
      params: the whole tree of the model's parameters, JAX arrays on one device.

    Raises:
      ValueError: where the parameters are not those of `config`, or requests are in progress.
      RuntimeError: where vLLM refuses; its weights may then be half old, half new, so restart it.
    """
    _refuse_busy(llm)
    # Where the worker shares this process, so does its memory.
    if hasattr(getattr(llm.llm_engine, "model_executor", None), "driver_worker"):
        tensors = hf_weights.published_tensors(config, to_torch(params))
        llm.collective_rpc(_load, args=(tensors,))
    else:
        with tempfile.TemporaryDirectory(dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else None) as folder:
            hf_weights.save(folder, config, params)
            llm.collective_rpc("load_weights_of_folder", args=(folder,))
    reset_caches(llm)


def update_from_folder(llm: Any, folder: str | os.PathLike[str]) -> None:
    """The same with weights that lie in a folder, as `hf_weights.save` writes them.

    Args:
      llm: a `vllm.LLM` that was started with `worker_extension_cls=WORKER_EXTENSION` and has no request in progress.
      folder: holds *.safetensors of the whole model.

    Raises:
      ValueError, RuntimeError: see `update_weights`.
    """
    _refuse_busy(llm)
    llm.collective_rpc("load_weights_of_folder", args=(os.fspath(folder),))
    reset_caches(llm)


def _refuse_busy(llm: Any) -> None:
    if llm.llm_engine.has_unfinished_requests():
        raise ValueError("vLLM is answering requests; wait until generate or chat has returned, then update")


def reset_caches(llm: Any) -> None:
    """Forgets whatever old weights computed: keys and values of prefixes, outputs of the vision encoder.

    vLLM's own reload clears the worker's half of the encoder cache and not the scheduler's, which then takes an image
    that it has seen to be encoded already. Images are cached by their content, which does not change with the weights.
    """
    llm.llm_engine.reset_encoder_cache()
    llm.reset_mm_cache()
    if not llm.reset_prefix_cache():
        raise RuntimeError("vLLM did not reset its prefix cache; blocks of it are still in use")


class WorkerExtension:
    """What vLLM mixes into its workers, so that they can be told by name to read a folder."""

    def load_weights_of_folder(self, folder: str) -> None:
        from safetensors.torch import load_file

        _load(self, (pair for path in sorted(Path(folder).glob("*.safetensors")) for pair in load_file(path).items()))

    def use_policy_sampler(self, forbidden: Sequence[int]) -> None:
        from mindjax.interop.vllm_sampling import install

        install(self, forbidden)


def _load(worker: Any, weights: Weights) -> None:
    """Runs in a worker: vLLM's in-place reload, and what vLLM 0.32 leaves undone on the CPU."""
    from vllm.platforms import current_platform

    model, on_cpu = worker.get_model(), current_platform.is_cpu()
    if on_cpu:
        # Experts are padded and packed when their kernel is built, which happens once; without it, it is built again.
        for module in model.modules():
            if getattr(getattr(module, "quant_method", None), "moe_kernel", None) is not None:
                module.quant_method.moe_kernel = None
    with torch.no_grad():
        worker.reload_weights(weights_iterator=weights, is_checkpoint_format=True)
    if on_cpu:
        # A tied head is loaded through the embedding and keeps its packed copy of the old table.
        for module in model.modules():
            if hasattr(module, "cpu_linear") and getattr(module, "weight", torch.empty(0)).numel():
                module.quant_method.process_weights_after_loading(module)
