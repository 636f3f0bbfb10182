"""What a run starts from, a model folder or a catalog name for random weights, and the folder that it leaves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mindjax.config import ModelConfig
from mindjax.data.processor import Processor
from mindjax.data.samples import new_processor
from mindjax.models import catalog, hf_weights
from mindjax.types import Sample
from sharding.layout import Layout
from sharding.parallel import Parallel
from sharding.processes import is_first


def open_model(
    name: str, samples: Sequence[Sample], max_pixels: int = 0, layout: Layout | None = None
) -> tuple[ModelConfig, dict[str, Any], Processor]:
    """Config, float32 parameters and processor.

    Args:
      name: a folder, or a name of the catalog.
      samples: a catalog name has no tokenizer; one is trained on their text.
      max_pixels: of an image; 0 leaves the folder's limit.
      layout: the devices to place the parameters on as they are read; None is one.

    Raises:
      ValueError: neither a folder nor a name, or a catalog name without `max_pixels`.
    """
    model, params = catalog.load(name, dtype="float32", parallel=None if layout is None else Parallel.of(layout))
    if Path(name).is_dir():
        processor = Processor.from_pretrained(name)
        if max_pixels:
            processor = processor.with_pixel_limits(min(processor.image.min_pixels, max_pixels), max_pixels)
        return model, params, processor
    if not max_pixels:
        raise ValueError(f"{name!r} is random weights without a processor: set max_pixels, the area of an image")
    model, processor = new_processor(model, samples, max_pixels)
    return model, params, processor


def export(folder: Path, model: ModelConfig, params: dict[str, Any], processor: Processor) -> None:
    """Writes an HF folder that opens by itself: weights, configs, tokenizer and processor.

    Several processes call it together, and the first one writes.
    """
    generation = {"eos_token_id": processor.im_end_token_id, "pad_token_id": processor.endoftext_token_id}
    hf_weights.save(folder, model, params, generation=generation)
    if is_first():
        processor.save_pretrained(folder)
