"""Accuracy of a model folder on held-out task images, or on a JSONL file of questions with verifiable answers.

    mindjax eval --config=experiments/eval.py --config.model=runs/quickstart/model
    mindjax eval --config=experiments/eval.py --config.data.path=questions.jsonl --config.data.families="()"

`:debug` asks random weights a few questions.
"""

from ml_collections import ConfigDict

SIZES = ("debug",)


def get_config(size: str = "") -> ConfigDict:
    """The recipe; the debug size changes the model and counts alone."""
    debug = size == "debug"
    config = ConfigDict()
    config.kind = "eval"
    config.model = "tiny" if debug else "runs/quickstart/model"
    config.max_pixels = 64 * 96
    config.max_new_tokens = 16
    config.temperature = 0.0
    config.seed = 0
    config.data = _items("test", 4 if debug else 200)
    # What a guess that never looks is learned from.
    config.baseline = _items("train", 20 if debug else 400)
    return config


def _items(split: str, count: int) -> ConfigDict:
    data = ConfigDict()
    data.path = ""
    data.families = ("digit_read", "letters_read", "shape", "quadrant", "colour", "digit_largest", "locate")
    data.variant = "cloze"
    data.split = split
    data.count = count
    data.seed = 0
    return data
