"""`mindjax generate` on a saved model: the JSON line, the text for people, and its errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from mindjax.cli import main
from mindjax.data.packing import collate_prompts
from mindjax.data.render import append_completion, render
from mindjax.inference.generate import read_messages, stop_token_ids
from mindjax.models import hf_weights, qwen3_vl
from tests.rl import tiny


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    """(folder, config, parameters, processor, messages.json with an image path)."""
    folder = tmp_path_factory.mktemp("model")
    config, params, processor = tiny.policy()
    hf_weights.save(folder, config, params)
    processor.save_pretrained(folder)
    picture = folder / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 24, 3)).astype(np.uint8)).save(picture)
    content = [{"type": "image", "image": str(picture)}, {"type": "text", "text": "colour?"}]
    path = folder / "messages.json"
    path.write_text(json.dumps([{"role": "user", "content": content}]))
    return folder, config, params, processor, path


def test_json_line(saved: tuple[Any, ...], capsys: pytest.CaptureFixture[str]) -> None:
    folder, config, params, processor, path = saved
    options = ["--messages", str(path), "--max-new-tokens", "12", "--temperature", "0", "--ignore-eos", "--json"]
    assert main(["generate", str(folder), *options, "--dtype", "float32"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result) == {"prompt_token_ids", "prompt_logprobs", "token_ids", "logprobs", "text"}

    prompt = render(json.loads(path.read_text()), processor, add_generation_prompt=True)
    assert result["prompt_token_ids"] == prompt.tokens.tolist() and config.image_token_id in prompt.tokens
    assert len(result["token_ids"]) == 12
    assert result["text"] == processor.tokenizer.decode(result["token_ids"], skip_special_tokens=True)
    whole = append_completion(prompt, result["token_ids"])
    logp = jax.jit(lambda p, b: qwen3_vl.token_logprobs(p, config, b).logp)(params, collate_prompts([whole]))
    expected = np.asarray(logp)[0, 1 : len(whole.tokens)]
    assert result["prompt_logprobs"][0] is None
    np.testing.assert_allclose(result["prompt_logprobs"][1:] + result["logprobs"], expected, rtol=0, atol=1e-4)
    # Greedy: no token at those places is more likely than the one taken.
    scores = jax.jit(lambda p, b: qwen3_vl.logits(p, qwen3_vl.forward(p, config, b).hidden))(
        params, collate_prompts([whole])
    )
    taken = np.asarray(scores)[0, len(prompt.tokens) - 1 : len(whole.tokens) - 1].copy()
    taken[:, [config.image_token_id, config.video_token_id, config.vision_start_token_id,
              config.vision_end_token_id]] = -np.inf  # fmt: skip
    assert taken.argmax(-1).tolist() == result["token_ids"]


def test_text_for_people_and_seeds(saved: tuple[Any, ...], capsys: pytest.CaptureFixture[str]) -> None:
    folder, *_, path = saved
    options = ["--messages", str(path), "--max-new-tokens", "8", "--ignore-eos", "--temperature", "1"]
    outputs = []
    for seed in ("1", "1", "2"):
        assert main(["generate", str(folder), *options, "--seed", seed]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]
    assert "8 out, cut at --max-new-tokens 8]" in outputs[0]


def test_stop_tokens_come_from_the_tokenizer_and_the_folder(saved: tuple[Any, ...], tmp_path: Path) -> None:
    *_, processor, _ = saved
    own = {processor.im_end_token_id, processor.endoftext_token_id}
    assert set(stop_token_ids(processor)) == set(stop_token_ids(processor, tmp_path)) == own
    for named, expected in ((7, {7}), ([7, 8], {7, 8}), (None, set())):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
        assert set(stop_token_ids(processor, tmp_path)) == own | expected


def test_bad_messages_are_named(saved: tuple[Any, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved[0]
    missing = tmp_path / "absent.json"
    assert main(["generate", str(folder), "--messages", str(missing)]) == 2
    assert str(missing) in capsys.readouterr().err
    bad = tmp_path / "bad.json"
    for text, message in (("{", "not valid JSON"), ('"hello"', "list of messages"), ('["hello"]', "list of messages")):
        bad.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_messages(bad)
    bad.write_text('{"messages": [{"role": "user", "content": "hello"}]}')
    assert read_messages(bad) == [{"role": "user", "content": "hello"}]
    assert main(["generate", "no/such/folder", "--messages", str(bad)]) == 2
    assert "no/such/folder" in capsys.readouterr().err
