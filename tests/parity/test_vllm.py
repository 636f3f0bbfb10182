"""An exported checkpoint in real vLLM on the CPU: the same prompt, greedy tokens and log-probabilities as here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from mindjax.config import ModelConfig, TextConfig, VisionConfig
from mindjax.data.images import ImageProcessor
from mindjax.data.packing import collate_prompts
from mindjax.data.processor import Processor
from mindjax.data.render import render
from mindjax.data.tokenizer import train_tokenizer
from mindjax.data.video import VideoProcessor
from mindjax.inference.sampler import SamplingConfig, generate
from mindjax.interop import vllm as vllm_reference
from mindjax.models import catalog, hf_weights, qwen3_vl

NEW_TOKENS = 24
# Two float32 programs of the same sums in another order. Log-probs here lie between -2 and -10; found 2.4e-6 at most,
# the bound leaves room for other thread counts.
LOGPROB_ATOL = 2e-5
# The last conversation's picture is resized: torchvision rounds a few pixels to the neighbouring grey level, 0.008 of
# the model's input range. Found 5e-4.
RESIZED, RESIZED_ATOL = 3, 5e-3

TEXTS = ["What do you see in the picture? A digit: seven.", "Compare the two pictures.", "Say something."]


@dataclass(frozen=True)
class Pair:
    """A model here, and vLLM's answers to the same conversations.

    Attributes:
      conversations: HF chat messages; images as paths.
      answers: of vLLM, one per conversation.
    """

    config: ModelConfig
    params: dict[str, Any]
    processor: Processor
    conversations: list[list[dict[str, Any]]]
    answers: list[dict[str, Any]]


def _processor() -> Processor:
    tokenizer = train_tokenizer(TEXTS, 300)
    image = ImageProcessor(patch_size=8, min_pixels=32 * 32, max_pixels=128 * 128)
    return Processor(tokenizer, image, VideoProcessor(patch_size=8), tokenizer.chat_template)


def _config(processor: Processor, *, moe: bool) -> ModelConfig:
    """head_dim 64: the least that vLLM's CPU attention runs. The dense model is tied, the mixture is not."""
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48} if moe else {}
    return ModelConfig(
        TextConfig(len(processor.tokenizer), 128, 192, 3, 4, 2, 64, (12, 10, 10), 10_000.0, **experts),
        VisionConfig(3, 64, 96, 2, 128, (0, 2), num_position_embeddings=36, patch_size=8),
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        vision_start_token_id=processor.vision_start_token_id,
        vision_end_token_id=processor.vision_end_token_id,
        tie_word_embeddings=not moe,
    )


def _params(config: ModelConfig, seed: int) -> dict[str, Any]:
    """Weights that matter: products of scale 1, norms and biases random too, logits of scale 1 to 2."""
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name = jax.tree_util.keystr(path)
        x = rng.standard_normal(leaf.shape).astype(np.float32)
        if "bias" in name or "norm" in name:
            return 0.2 * x + (0.0 if "bias" in name else 1.0)
        # A small embedding, or a tied model would only ever repeat the last token.
        return x * (0.06 if name.endswith("['embed']") else leaf.shape[-2] ** -0.5)

    return jax.tree_util.tree_map_with_path(draw, qwen3_vl.abstract_params(config))


def _picture(folder: Path, name: str, width: int, height: int, seed: int) -> dict[str, str]:
    """Smooth enough that resizing means something; sizes that are multiples of 16 are not resized at all."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    coarse.resize((width, height), Image.Resampling.BICUBIC).save(folder / name)
    return {"type": "image", "image": str(folder / name)}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    folder = tmp_path_factory.mktemp("vllm")
    processor = _processor()
    wide, tall = _picture(folder, "wide.png", 96, 64, 0), _picture(folder, "tall.png", 32, 80, 1)
    odd = _picture(folder, "odd.png", 90, 60, 2)
    conversations: list[list[dict[str, Any]]] = [
        [{"role": "user", "content": [wide, {"type": "text", "text": TEXTS[0]}]}],
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": TEXTS[1]}, tall, wide]},
            {"role": "assistant", "content": "One is wide."},
            {"role": "user", "content": TEXTS[2]},
        ],
        [{"role": "user", "content": TEXTS[2]}],
        [{"role": "user", "content": [odd, {"type": "text", "text": TEXTS[0]}]}],
    ]
    exported = {}
    for kind in ("dense", "moe"):
        config = _config(processor, moe=kind == "moe")
        params = _params(config, seed=2)
        hf_weights.save(folder / kind, config, params, generation={"eos_token_id": processor.im_end_token_id})
        processor.save_pretrained(folder / kind)
        exported[kind] = (config, params)
    # What our sampler never draws; vLLM would.
    forbidden = [
        processor.image_token_id, processor.video_token_id,
        processor.vision_start_token_id, processor.vision_end_token_id,
    ]  # fmt: skip
    answers = vllm_reference.greedy(
        [(folder / kind, conversations) for kind in exported], max_new_tokens=NEW_TOKENS, forbidden_tokens=forbidden
    )
    pairs = {}
    for (kind, (config, _)), answer in zip(exported.items(), answers, strict=True):
        read_config, read = catalog.load(folder / kind, dtype="float32")
        assert read_config == config
        pairs[kind] = Pair(config, read, Processor.from_pretrained(folder / kind), conversations, answer)
    return pairs


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_vllm_gives_the_same_tokens_and_logprobs(pairs: dict[str, Pair], kind: str) -> None:
    pair = pairs[kind]
    prompts = [render(messages, pair.processor, add_generation_prompt=True) for messages in pair.conversations]
    sampling = SamplingConfig(max_new_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
    completions = [answers[0] for answers in generate(pair.params, pair.config, prompts, sampling=sampling)]
    batch = collate_prompts(prompts, merge_size=pair.config.vision.spatial_merge_size)
    prompt_logprobs = np.asarray(
        jax.jit(qwen3_vl.token_logprobs, static_argnums=1)(pair.params, pair.config, batch).logp
    )

    assert len({token for answer in pair.answers for token in answer["token_ids"]}) > 15  # answers that could go wrong

    for row, (prompt, ours, theirs) in enumerate(zip(prompts, completions, pair.answers, strict=True)):
        atol = RESIZED_ATOL if row == RESIZED else LOGPROB_ATOL
        assert prompt.tokens.tolist() == theirs["prompt_token_ids"]
        np.testing.assert_allclose(
            prompt_logprobs[row, 1 : len(prompt.tokens)], theirs["prompt_logprobs"][1:], rtol=0, atol=atol
        )
        assert list(ours.token_ids) == theirs["token_ids"]
        np.testing.assert_allclose(ours.logprobs, theirs["logprobs"], rtol=0, atol=atol)
