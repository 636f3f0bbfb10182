"""What `mindjax bench` measures against: transformers' Qwen3-VL on torch, with the fastest settings known for it."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import (
    AutoConfig,
    GenerationConfig,
    PreTrainedModel,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeForConditionalGeneration,
)

from mindjax.config import ModelConfig
from mindjax.data.render import Rendered

if TYPE_CHECKING:
    from mindjax.train.optimizer import OptimizerConfig

# Steps of each candidate setting before the fastest is chosen; the first ones of a compiled model compile again.
WARM_UP_STEPS = 3
TRIAL_STEPS = 2


def build_model(config: ModelConfig, dtype: str, **implementation: str) -> PreTrainedModel:
    """A randomly initialised transformers model of the same shape.

    Args:
      config: the shape.
      dtype: of the parameters, "float32" or "bfloat16".
      implementation: `attn_implementation`, `experts_implementation`.
    """
    moe = config.text.num_experts > 0
    fields = {key: value for key, value in config.to_hf().items() if key != "model_type"}
    hf_config = AutoConfig.for_model("qwen3_vl_moe" if moe else "qwen3_vl", **fields)
    cls = Qwen3VLMoeForConditionalGeneration if moe else Qwen3VLForConditionalGeneration
    if not moe:
        implementation.pop("experts_implementation", None)
    torch.manual_seed(0)
    return cls._from_config(hf_config, dtype=getattr(torch, dtype), **implementation)


def model_inputs(rows: Sequence[Rendered], *, left_pad: bool = False) -> dict[str, torch.Tensor]:
    """Keyword arguments of the transformers model, one conversation per row, labels included."""
    length = max(len(row.tokens) for row in rows)

    def stacked(name: str, fill: int) -> torch.Tensor:
        out = np.full((len(rows), length), fill, np.int64)
        for i, row in enumerate(rows):
            values = getattr(row, name)
            place = slice(length - len(values), None) if left_pad else slice(len(values))
            out[i, place] = values
        return torch.from_numpy(out)

    mask = np.zeros((len(rows), length), np.int64)
    for i, row in enumerate(rows):
        mask[i, slice(length - len(row.tokens), None) if left_pad else slice(len(row.tokens))] = 1
    tokens = stacked("tokens", 0)
    inputs = {
        "input_ids": tokens,
        "attention_mask": torch.from_numpy(mask),
        "mm_token_type_ids": stacked("modality", 0).int(),
        "labels": torch.where(stacked("loss_mask", 0) > 0, tokens, -100),
    }
    frames = [frame for row in rows for frame in row.frames]
    if frames:
        inputs["pixel_values"] = torch.from_numpy(np.concatenate([patches for patches, _ in frames]))
        inputs["image_grid_thw"] = torch.tensor([(1, *grid) for _, grid in frames])
    return inputs


class Trainer:
    """Forward, backward, clipping and AdamW, all of transformers and torch."""

    def __init__(
        self,
        config: ModelConfig,
        rows: Sequence[Rendered],
        optimizer: OptimizerConfig,
        dtype: str,
        *,
        attention: str = "sdpa",
        experts: str = "eager",
        masters: bool = False,
        compiled: bool = False,
    ):
        """Args:
        dtype: of the computation.
        compiled: by `torch.compile`, of which only errors are heard.
        masters: whether parameters and moments stay float32 under autocast, as on our side; else they are of `dtype`.
        """
        self._autocast = torch.autocast("cpu", getattr(torch, dtype), enabled=masters and dtype != "float32")
        parameter_dtype = "float32" if masters else dtype
        self._model = build_model(
            config, parameter_dtype, attn_implementation=attention, experts_implementation=experts
        ).train()
        if compiled:
            torch._logging.set_logs(all=logging.ERROR)
            self._model.compile()
        self._inputs = model_inputs(rows)
        if "pixel_values" in self._inputs:
            self._inputs["pixel_values"] = self._inputs["pixel_values"].to(getattr(torch, parameter_dtype))
        self._clip = optimizer.clip_norm
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(),
            lr=optimizer.learning_rate,
            betas=(optimizer.b1, optimizer.b2),
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            fused=True,
        )

    def step(self) -> float:
        """One step; returns the loss before it."""
        with self._autocast:
            loss = self._model(**self._inputs, use_cache=False).loss
        loss.backward()
        if self._clip:
            torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._clip, foreach=True)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())


class Sampler:
    """`generate` with its default cache, no early stop."""

    def __init__(
        self,
        config: ModelConfig,
        prompts: Sequence[Rendered],
        dtype: str,
        *,
        new_tokens: int,
        attention: str,
        experts: str,
    ):
        self._model = build_model(config, dtype, attn_implementation=attention, experts_implementation=experts).eval()
        self._inputs = model_inputs(prompts, left_pad=True)
        del self._inputs["labels"]
        if "pixel_values" in self._inputs:
            self._inputs["pixel_values"] = self._inputs["pixel_values"].to(getattr(torch, dtype))
        self._generation = GenerationConfig(
            max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            eos_token_id=None, pad_token_id=0, use_cache=True,
        )  # fmt: skip

    @torch.inference_mode()
    def step(self) -> int:
        """One call; returns how many tokens came out in all."""
        out = self._model.generate(**self._inputs, generation_config=self._generation)
        return int(out.shape[0] * (out.shape[1] - self._inputs["input_ids"].shape[1]))


def fastest(make: Callable[..., Any], settings: dict[str, Sequence[Any]]) -> tuple[Any, dict[str, Any]]:
    """Builds a runner for each combination of settings, times a few steps of each, keeps the fastest.

    Returns:
      (the runner, its settings). A combination that torch refuses is left out.
    """
    best: tuple[float, Any, dict[str, Any]] | None = None
    refused: list[str] = []
    for values in itertools.product(*settings.values()):
        setting = dict(zip(settings, values, strict=True))
        try:
            runner = make(**setting)
            for _ in range(WARM_UP_STEPS):
                runner.step()
            start = time.perf_counter()
            for _ in range(TRIAL_STEPS):
                runner.step()
            seconds = time.perf_counter() - start
        except (RuntimeError, ValueError, NotImplementedError) as error:
            refused.append(f"{setting}: {error}")
            continue
        if best is None or seconds < best[0]:
            best = (seconds, runner, setting)
        del runner
    if best is None:
        raise RuntimeError(f"no setting of the baseline runs: {refused}")
    return best[1], best[2]
