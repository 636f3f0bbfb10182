import json
from dataclasses import replace

import jax
import pytest
from ml_collections import ConfigDict

from mindjax.data import tasks
from mindjax.data.samples import new_processor
from mindjax.evaluation.run import Reply, accuracy, ask, main, read_replies, table, write_replies
from mindjax.experiment import load_experiment, to_dataclass
from mindjax.models import hf_weights, qwen3_vl
from mindjax.pipeline import PipelineConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder with random weights, at the debug size of the quickstart."""
    config = load_experiment("experiments/quickstart.py:debug")
    settings = to_dataclass(PipelineConfig, {key: value for key, value in config.items() if key != "kind"})
    model, processor = new_processor(settings.model, tasks.build("quadrant", "train", 50, 0), settings.max_pixels)
    folder = tmp_path_factory.mktemp("model")
    hf_weights.save(folder, model, qwen3_vl.init(model, jax.random.key(0)))
    processor.save_pretrained(folder)
    return folder


def test_the_command_writes_replies_verbatim_and_accuracies_beside_the_baseline(folder, tmp_path, capsys):
    config = ConfigDict(
        {
            "kind": "eval",
            "model": str(folder),
            "data": {"families": ("quadrant", "text_only"), "split": "test", "count": 6},
            "baseline": {"families": ("quadrant", "text_only"), "split": "train", "count": 40},
            "max_new_tokens": 4,
        }
    )
    main(config, tmp_path)
    replies = read_replies(tmp_path / "replies.jsonl")
    assert len(replies) == 12 and {reply.task for reply in replies} == {"quadrant", "text_only"}
    assert all(1 <= reply.tokens <= 4 for reply in replies)
    written = json.loads((tmp_path / "accuracy.json").read_text())
    for task, interval in accuracy(replies).items():
        assert written[task]["mean"] == interval.mean and 0 <= written[task]["blind"] <= 1
    printed = capsys.readouterr().out
    assert "blind" in printed and "quadrant" in printed


def test_an_item_that_cannot_be_judged_is_refused_before_anything_is_asked(folder):
    sample = replace(tasks.build("quadrant", "test", 1, 0)[0], answer=None)
    with pytest.raises(ValueError, match="no verifiable answer"):
        ask(None, None, None, [sample])  # type: ignore[arg-type]


def test_replies_survive_the_file_to_the_character(tmp_path):
    replies = [
        Reply("a/0", "a", ' "ü"\\boxed{7}\n\u2028<|im_end|>', True, 5, "stop"),
        Reply("b/0", "b", "", False, 1, "length"),
    ]
    write_replies(tmp_path / "x" / "replies.jsonl", replies)
    assert read_replies(tmp_path / "x" / "replies.jsonl") == replies


def test_the_table_has_a_column_per_model_and_the_baseline():
    replies = [Reply("a/0", "a", "1", True, 1, "stop"), Reply("a/1", "a", "2", False, 1, "stop")]
    shown = table({"first": accuracy(replies), "second": {}}, {"a": 0.25})
    assert "25.0%" in shown and "50% [9%, 91%]" in shown and "second" in shown
