"""vLLM's sampler with the conventions of `mindjax.inference.sampler`; runs where vLLM samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

_GREEDY = 1e-5  # what vLLM takes for temperature 0


class PolicySampler(Sampler):
    """Never draws the forbidden tokens, and reports the log-probabilities of what it draws from.

    vLLM 0.32 has two kinds. Raw ones are those of temperature 1. Processed ones are renormalised over what was
    allowed, so that forbidding a token raises all others. Here logits are divided by the temperature first: raw ones
    are then log softmax(logits / temperature) over the whole vocabulary, as `token_logprobs` of the training forward
    has it. Where top_k or top_p limit a request of the batch, they are those renormalised over what is left. Greedy
    requests report temperature 1.
    """

    def __init__(self, forbidden: Sequence[int], use_fp64_gumbel: bool) -> None:
        # With processed log-probs it never takes FlashInfer's kernels, which know neither seeds nor log-probs.
        super().__init__("processed_logprobs", use_fp64_gumbel)
        self.forbidden = list(forbidden)

    def forward(self, logits: torch.Tensor, sampling_metadata: SamplingMetadata, *args: Any, **kwargs: Any) -> Any:
        logits = logits.to(torch.float32)
        temperature = sampling_metadata.temperature
        if temperature is not None and not sampling_metadata.all_greedy:
            greedy = temperature < _GREEDY
            logits = logits / torch.where(greedy, 1.0, temperature)[:, None]
            sampling_metadata = dataclasses.replace(
                sampling_metadata, temperature=torch.where(greedy, temperature, 1.0)
            )
        limited = sampling_metadata.top_k is not None or sampling_metadata.top_p is not None
        mode = "processed_logprobs" if limited and not sampling_metadata.all_greedy else "raw_logprobs"
        self.logprobs_mode = self.topk_topp_sampler.logprobs_mode = mode
        return super().forward(logits, sampling_metadata, *args, **kwargs)

    def apply_logits_processors(self, logits: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        logits = super().apply_logits_processors(logits, *args, **kwargs)
        logits[:, self.forbidden] = -torch.inf
        return logits


def install(worker: Any, forbidden: Sequence[int]) -> None:
    """Gives a vLLM worker this sampler; its model runner must be the first version (VLLM_USE_V2_MODEL_RUNNER=0)."""
    sampler = worker.model_runner.sampler
    if not isinstance(sampler, Sampler):
        raise RuntimeError(
            f"vLLM samples with {type(sampler).__name__}, whose log-probabilities follow other rules; start it with "
            "VLLM_USE_V2_MODEL_RUNNER=0"
        )
    worker.model_runner.sampler = PolicySampler(forbidden, sampler.use_fp64_gumbel)
