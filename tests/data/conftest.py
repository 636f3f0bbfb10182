"""A small processor of ours, and transformers' processor read from the folder that ours wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mindjax.data.images import ImageProcessor
from mindjax.data.processor import Processor
from mindjax.data.tokenizer import CHAT_TEMPLATE, train_tokenizer
from mindjax.data.video import VideoProcessor

CORPUS = [
    "What is the number in the picture? It is seven. assistant user system tool\n\n",
    "<0.5 seconds> <1.5 seconds> the quick brown fox jumps over the lazy dog; don't stop\n",
    "Ein Wort mit Umlaut: über. 你好 世界 Привет, мир! 1234567890 {\"name\": \"f\", \"arguments\": {}}\n\n\n",
    "Pack my box with five dozen liquor jugs; how quick daft zebras jump. Sphinx of black quartz, judge my vow.",
]  # fmt: skip


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    return CORPUS


@pytest.fixture(scope="session")
def processor(corpus: list[str]) -> Processor:
    return Processor(
        tokenizer=train_tokenizer(corpus, vocab_size=450),
        image=ImageProcessor(min_pixels=32 * 32, max_pixels=160 * 160),
        video=VideoProcessor(min_pixels=4 * 32 * 32, max_pixels=8 * 64 * 64),
        chat_template=CHAT_TEMPLATE,
    )


@pytest.fixture(scope="session")
def model_folder(processor: Processor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def reference(model_folder: Path) -> Any:
    """transformers' Qwen3VLProcessor, with its torchvision image processor."""
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(model_folder)
