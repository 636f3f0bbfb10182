"""A sequence-pair classifier through transformers: whether two answers say the same, for the diversity advantage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

Pairs = Sequence[tuple[str, str]]


def load(folder: str, *, max_tokens: int = 256, batch: int = 64) -> Callable[[Pairs], np.ndarray]:
    """Opens a DeBERTa-class classifier, as transformers saves one with its tokenizer.

    It has two labels, of which the second means "the same", or one, whose logit rises with likeness; so have those of
    NoveltyBench. It runs on the CPU: a GPU belongs to the policy, and answers are short.

    Args:
      folder: with config.json, weights and a tokenizer.
      max_tokens: of a pair; the longer text is cut first.
      batch: pairs at a time.

    Returns:
      pairs of texts -> [pairs] float64, the probability that they say the same. The order in a pair may matter.

    Raises:
      ValueError: there is no such classifier in the folder.
    """
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"distance: {folder!r} holds no config.json; name a folder that save_pretrained has written")
    model, loading = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    # transformers makes a missing head up and warns: what it says would be noise.
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(f"distance: {folder!r} is no trained classifier, it lacks {', '.join(missing[:3])}")
    labels = model.config.num_labels
    if labels not in (1, 2):
        raise ValueError(f"distance: the classifier in {folder!r} has {labels} labels; it needs 2, different and same")
    model.eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    @torch.inference_mode()
    def classify(pairs: Pairs) -> np.ndarray:
        scores = [torch.zeros(0, dtype=torch.float64)]
        for start in range(0, len(pairs), batch):
            first, second = zip(*pairs[start : start + batch], strict=True)
            encoded = tokenizer(
                list(first), list(second), truncation=True, max_length=max_tokens, padding=True, return_tensors="pt"
            )
            logits = model(**encoded).logits.double()
            scores.append(logits[:, 0].sigmoid() if labels == 1 else logits.softmax(-1)[:, 1])
        return torch.cat(scores).numpy()

    return classify
