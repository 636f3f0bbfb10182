"""What `mindjax bench rl` runs in processes of their own: our step, and the rollout on each side.

`python -m mindjax.bench_rl_sides step CASE` and `... SIDE CASE FOLDER`, with a case as JSON and the model's folder.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np

from mindjax.bench import answer, peak_memory
from mindjax.config import ModelConfig, TextConfig, VisionConfig
from mindjax.types import Sample, Trajectory

if TYPE_CHECKING:
    from mindjax.data.processor import Processor
    from mindjax.data.render import Rendered

SHARES = ("rollout", "logprob", "reward", "update", "transfer")
WARM_UP = 5  # Tunix compiles until its fourth step


@dataclass(frozen=True)
class StepCase:
    """One RL step.

    Attributes:
      size: "full" or "tiny".
      prompts, samples: per step, and per prompt.
      prompt_tokens, new_tokens: of text.
      pictures: whether each prompt also has a picture of 96 x 96 pixels, 36 tokens.
      updates: per rollout; with more than one the old log-probabilities are computed.
      repetitions: timed steps.
    """

    size: str = "full"
    prompts: int = 4
    samples: int = 4
    prompt_tokens: int = 64
    new_tokens: int = 64
    pictures: bool = False
    updates: int = 1
    repetitions: int = 9


@dataclass(frozen=True)
class RolloutCase:
    """One rollout.

    Attributes:
      size: "full" or "tiny".
      pictures, samples: prompts, and answers to each.
      text: tokens of a prompt beside its picture's.
      shortest, longest: of an answer, in tokens.
      dtype: of weights and computation.
      weights: "int8" or "fp8", of our side's layers; "none" leaves them as they are.
    """

    size: str = "full"
    pictures: int = 4
    samples: int = 8
    text: int = 64
    shortest: int = 8
    longest: int = 64
    dtype: str = "float32"
    weights: str = "none"

    @property
    def lengths(self) -> np.ndarray:
        """[pictures, samples] tokens of each answer: the range evenly, in an order that mixes every prompt's."""
        even = np.linspace(self.shortest, self.longest, self.pictures * self.samples).round().astype(int)
        return np.random.default_rng(0).permutation(even).reshape(self.pictures, self.samples)


def step_model(size: str) -> ModelConfig:
    """4 layers x 256, with the encoder of `tiny`; at size "tiny" 2 layers x 64."""
    layers, hidden, heads = (4, 256, 4) if size == "full" else (2, 64, 2)
    return ModelConfig(
        TextConfig(1024, hidden, 3 * hidden, layers, heads, heads // 2, 64, (12, 10, 10), rope_theta=10_000.0),
        VisionConfig(layers, 128, 256, 4, hidden, tuple(range(layers - 1)), 256, patch_size=8),
        tie_word_embeddings=True,
    )


def rollout_model(size: str) -> ModelConfig:
    """About 260 million parameters, heads of 64, which vLLM's CPU attention asks; at size "tiny" `step_model`."""
    if size == "tiny":
        return step_model(size)
    return ModelConfig(
        TextConfig(32_768, 1024, 3072, 14, 16, 8, 64, (12, 10, 10), rope_theta=10_000.0),
        VisionConfig(8, 512, 2048, 8, 1024, (1, 3, 5), 1024, patch_size=16),
        tie_word_embeddings=True,
    )


def conversations(model: ModelConfig, count: int, text: int, side: int) -> tuple[ModelConfig, Processor, list[Sample]]:
    """Questions of exactly `text` tokens, each after a picture of `side` x `side` pixels (0: without one).

    Returns:
      (the model with the tokenizer's control tokens, the processor, samples). A digit is a token of its own.
    """
    from mindjax.data.samples import new_processor

    rng = np.random.default_rng(0)

    def sample(number: int, digits: int) -> Sample:
        words = {"type": "text", "text": "".join(map(str, rng.integers(0, 10, digits)))}
        pixels = rng.integers(0, 256, (side, side, 3)).astype(np.uint8)
        content = [{"type": "image", "image": pixels}, words] if side else [words]
        return Sample(({"role": "user", "content": content},), f"{number}", "", {"kind": "exact", "value": "1"})

    model, processor = new_processor(model, [sample(0, 1)], max(side, 32) ** 2)
    around = int((rendered(sample(0, 1), processor).modality == 0).sum()) - 1
    if text <= around:
        raise ValueError(f"a prompt has {around} tokens around its text; ask for more than that, not {text}")
    return model, processor, [sample(number, text - around) for number in range(count)]


# ---- the step


def odd(trajectory: Trajectory, sample: Sample) -> dict[str, float]:
    """Right where the first token is odd, as on Tunix's side: some answers of a group are, some are not."""
    del sample
    return {"correct": float(trajectory.segments[-1].token_ids[0] % 2)}


def our_step(case: StepCase) -> None:
    """`mindjax.rl.train`, whose evaluation at the end of each step waits for its turn."""
    import jax

    from mindjax.bench import CompileCounter
    from mindjax.models import qwen3_vl
    from mindjax.rl.config import RLConfig
    from mindjax.rl.rewards import RewardConfig
    from mindjax.rl.train import train
    from mindjax.train.metrics import read_metrics
    from mindjax.train.optimizer import OptimizerConfig

    counter = CompileCounter()
    model, processor, samples = conversations(
        step_model(case.size), 4 * case.prompts, case.prompt_tokens, 96 if case.pictures else 0
    )
    config = RLConfig(
        steps=WARM_UP + case.repetitions,
        prompts_per_step=case.prompts,
        samples_per_prompt=case.samples,
        updates_per_rollout=case.updates,
        max_new_tokens=case.new_tokens,
        evaluate_every=1,
        reward=RewardConfig(custom=("mindjax.bench_rl_sides:odd",)),
        optimizer=OptimizerConfig(
            learning_rate=1e-5, weight_decay=0.01, clip_norm=1.0, schedule="constant",
            multipliers=(("^vision", 0.0), (".*", 1.0)),
        ),
    )  # fmt: skip
    done, compiled, began = 0, 0, (time.perf_counter(), time.process_time())

    def turn(params: Any) -> dict[str, float]:
        nonlocal done, compiled, began
        jax.block_until_ready(params)
        done += 1
        if done == WARM_UP:
            compiled = counter.count
            answer({"settings": "float32", "warm_up": time.perf_counter() - began[0]})
        elif done > WARM_UP:
            wall, processor_time = time.perf_counter() - began[0], time.process_time() - began[1]
            answer({"seconds": wall, "cpu_seconds": processor_time})
        if WARM_UP <= done < config.steps:
            sys.stdin.readline()
            began = time.perf_counter(), time.process_time()
        return {}

    params = qwen3_vl.init(model, jax.random.key(0))
    with tempfile.TemporaryDirectory() as folder:
        train(config, model, params, samples, processor, folder, evaluate=turn)
        rows = read_metrics(folder)
    timed = [row for row in rows if row["step"] > WARM_UP]
    shares = {share: statistics.median(row[f"{share}_seconds"] for row in timed) for share in SHARES}
    answer({"peak": peak_memory(), "compiled": counter.count - compiled, "shares": shares})


# ---- the rollout


class Side(Protocol):
    """One side of the rollout."""

    settings: str

    def step(self) -> int:
        """One rollout; returns how many tokens came out in all."""

    def forget(self) -> None:
        """What new weights do to caches."""


class OurRollout:
    """`mindjax.inference.sampler.generate`."""

    def __init__(self, case: RolloutCase, folder: Path):
        from mindjax.inference.quantized import Kind, quantize_params
        from mindjax.inference.sampler import SamplingConfig
        from mindjax.models import catalog

        self._model, self._params = catalog.load(folder, dtype=case.dtype)
        self.settings = "limits per answer"
        if case.weights != "none":
            self._params = quantize_params(self._params, self._model, cast(Kind, case.weights))
            self.settings += f", {case.weights} weights"
        self._prompts, self._case, self._calls = prompts(case), case, 0
        self._sampling = SamplingConfig(
            max_new_tokens=int(case.lengths.max()), num_samples=case.samples, ignore_eos=True
        )

    def step(self) -> int:
        from mindjax.inference.sampler import generate, sampling_keys

        self._calls += 1
        keys = sampling_keys(0, self._calls, range(len(self._prompts)), self._case.samples)
        out = generate(
            self._params, self._model, self._prompts, sampling=self._sampling, keys=keys, limits=self._case.lengths
        )
        return sum(len(completion.token_ids) for row in out for completion in row)

    def forget(self) -> None:
        pass  # nothing outlives a call


class TransformersRollout:
    """Batched `generate` with its cache, at the faster of its attentions."""

    def __init__(self, case: RolloutCase, folder: Path):
        import torch

        from mindjax.interop.torch_baseline import Sampler, fastest

        del folder  # random weights of its own: they cost the same
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        model, rows = questions(case)[0], [row for row in prompts(case) for _ in range(case.samples)]
        self._runner, chosen = fastest(
            lambda **setting: Sampler(
                model, rows, case.dtype, new_tokens=int(case.lengths.max()), experts="eager", **setting
            ),
            {"attention": ("sdpa", "eager")},
        )  # fmt: skip
        self.settings = f"attention={chosen['attention']}, every answer to the longest"

    def step(self) -> int:
        return self._runner.step()

    def forget(self) -> None:
        pass


class VLLMRollout:
    """vLLM's engine in this process; the samples of a prompt share its prefix and its picture."""

    def __init__(self, case: RolloutCase, folder: Path):
        from PIL import Image
        from vllm import SamplingParams

        from mindjax.interop.vllm import start

        (model, _, samples), rows = questions(case), prompts(case)
        longest = max(len(row.tokens) for row in rows) + int(case.lengths.max())
        self._llm = start(
            folder, case.dtype, max_model_len=longest, max_num_seqs=case.pictures * case.samples,
            enable_prefix_caching=True, limit_mm_per_prompt={"image": 1, "video": 0},
        )  # fmt: skip
        self._requests, self._limits = [], []
        for sample, row, lengths in zip(samples, rows, case.lengths, strict=True):
            image = Image.fromarray(sample.messages[0]["content"][0]["image"])
            # vLLM puts in as many placeholders as the picture needs, in place of one.
            first = np.r_[True, (row.tokens[1:] != row.tokens[:-1]) | (row.tokens[1:] != model.image_token_id)]
            request = {"prompt_token_ids": row.tokens[first].tolist(), "multi_modal_data": {"image": image}}
            for length in lengths.tolist():
                self._requests.append(request)
                self._limits.append(
                    SamplingParams(temperature=1.0, max_tokens=length, ignore_eos=True, logprobs=0, detokenize=False)
                )
        self.settings = "prefix and encoder caches, limits per answer"

    def step(self) -> int:
        outputs = self._llm.generate(self._requests, self._limits, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    def forget(self) -> None:
        from mindjax.interop.vllm_update import reset_caches

        reset_caches(self._llm)


ROLLOUTS: dict[str, Callable[[RolloutCase, Path], Side]] = {
    "mindjax": OurRollout,
    "transformers": TransformersRollout,
    "vllm": VLLMRollout,
}


def picture_side(model: ModelConfig) -> int:
    """Pixels of a side: 12 x 12 patches, 36 tokens."""
    return 12 * model.vision.patch_size


def questions(case: RolloutCase) -> tuple[ModelConfig, Processor, list[Sample]]:
    """As `conversations`, one with each picture."""
    model = rollout_model(case.size)
    return conversations(model, case.pictures, case.text, picture_side(model))


def prompts(case: RolloutCase) -> list[Rendered]:
    """[pictures] rendered."""
    _, processor, samples = questions(case)
    return [rendered(sample, processor) for sample in samples]


def rendered(sample: Sample, processor: Processor) -> Rendered:
    """As the policy sees it."""
    from mindjax.data.render import render

    return render(sample.messages, processor, add_generation_prompt=True)


def write_model(case: RolloutCase, folder: Path) -> None:
    """The model that ours and vLLM read."""
    import jax

    from mindjax.models import qwen3_vl
    from mindjax.train.folder import export

    model, processor, _ = questions(case)
    export(folder, model, qwen3_vl.init(model, jax.random.key(0)), processor)


def rollout_side(side: str, case: RolloutCase, folder: Path) -> None:
    """A worker's life: build, warm up, then one rollout per line on stdin."""
    from mindjax.bench import CompileCounter

    counter = CompileCounter() if side == "mindjax" else None
    start = time.perf_counter()
    runner = ROLLOUTS[side](case, folder)
    for _ in range(2):
        runner.step()
        runner.forget()
    compiled = counter.count if counter else 0
    answer({"settings": runner.settings, "warm_up": time.perf_counter() - start})
    for _ in sys.stdin:
        wall, processor_time = time.perf_counter(), time.process_time()
        made = runner.step()
        wall, processor_time = time.perf_counter() - wall, time.process_time() - processor_time
        runner.forget()
        answer({"seconds": wall, "cpu_seconds": processor_time, "made": made})
    answer({"peak": peak_memory(), "compiled": counter.count - compiled if counter else 0})


if __name__ == "__main__":
    _, side, fields, *more = sys.argv
    if side == "step":
        our_step(StepCase(**json.loads(fields)))
    else:
        rollout_side(side, RolloutCase(**json.loads(fields)), Path(more[0]))
