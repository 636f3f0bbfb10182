"""Run by test_spread.py in a process with eight CPU devices: answers, or GSPO, over many devices against one."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mindjax.config import ModelConfig
from mindjax.data.processor import Processor
from mindjax.data.render import Rendered
from mindjax.data.samples import DataConfig, new_processor
from mindjax.inference.sampler import SamplingConfig, generate, sampling_keys
from mindjax.models import catalog, qwen3_vl
from mindjax.rl.config import RLConfig, RolloutConfig
from mindjax.rl.rewards import RewardConfig
from mindjax.rl.rollout import Prompt
from mindjax.rl.train import train
from mindjax.train.optimizer import OptimizerConfig
from mindjax.types import Completion, Sample
from sharding.layout import Layout
from sharding.parallel import Parallel
from sharding.reshard import reshard

Params = dict[str, Any]
TRAINER, ROLLOUT = Layout(fsdp=2, expert=2, tensor=2), Layout(data=2, expert=2, tensor=2)


def same(found: list[list[Completion]], wanted: list[list[Completion]]) -> float:
    """The largest difference of log-probabilities of the same tokens, infinite where others were drawn."""
    pairs = [(a, b) for x, y in zip(found, wanted, strict=True) for a, b in zip(x, y, strict=True)]
    if any(a.token_ids != b.token_ids for a, b in pairs):
        return float("inf")
    return max(float(np.abs(np.subtract(a.logprobs, b.logprobs)).max()) for a, b in pairs)


def main() -> None:
    samples = DataConfig(families=("digit_read", "colour"), count=10).load()
    model = catalog.CATALOG["tiny-moe"]
    vision = replace(model.vision, depth=2, deepstack_visual_indexes=(0,))
    model = replace(model, vision=vision, text=replace(model.text, num_hidden_layers=2))
    model, processor = new_processor(model, samples, 96 * 96)
    # Loud, so that answers differ and end at different lengths.
    params = jax.tree.map(lambda p: 3 * p if p.ndim > 2 else p, qwen3_vl.init(model, jax.random.key(1), jnp.float32))
    result = gspo(model, params, samples, processor, Path(sys.argv[2])) if sys.argv[1] == "gspo" else {}
    if sys.argv[1] == "answers":
        result = answers(model, params, [Prompt.of(i, s, processor).rendered for i, s in enumerate(samples)])
    print(json.dumps(result))


def answers(model: ModelConfig, params: Params, prompts: list[Rendered]) -> dict[str, Any]:
    trainer, rollout = Parallel.of(TRAINER), Parallel.of(ROLLOUT)
    assert trainer is not None and rollout is not None
    trained = jax.device_put(params, qwen3_vl.shardings(model, trainer))
    places = qwen3_vl.shardings(model, rollout)
    with jax.transfer_guard("disallow"):
        placed = jax.block_until_ready(reshard(trained, places))
    jax.tree.map(np.testing.assert_array_equal, placed, params)
    assert jax.tree.map(lambda leaf: leaf.sharding, placed) == places

    result: dict[str, Any] = {}
    keys = sampling_keys(0, 0, range(len(prompts)), 4)
    settings = SamplingConfig(max_new_tokens=16, num_samples=4, stop_token_ids=tuple(range(20, 28)))
    for name, sampling in (("greedy", replace(settings, temperature=0.0, num_samples=1)), ("drawn", settings)):
        mine = keys[:, : sampling.num_samples]
        wanted = generate(params, model, prompts, sampling=sampling, keys=mine)
        found = generate(placed, model, prompts, sampling=sampling, keys=mine, parallel=rollout)
        result[name] = same(found, wanted)
    return {**result, "lengths": len({len(answer.token_ids) for of_prompt in wanted for answer in of_prompt})}


def gspo(model: ModelConfig, params: Params, samples: list[Sample], processor: Processor, workdir: Path) -> Any:
    config = RLConfig(
        steps=2, prompts_per_step=4, samples_per_prompt=4, micro_batches=4, max_new_tokens=8, eps_low=0.2, eps_high=0.2,
        reward=RewardConfig(repetition=1.0, repetition_ngram=1), optimizer=OptimizerConfig(learning_rate=1e-4),
    )  # fmt: skip
    eight_bits = RolloutConfig(weights="int8")
    result = {}
    for name, one in (("full", config), ("8-bit", replace(config, rollout=eight_bits))):
        alone, spread = (
            train(run, model, params, samples, processor, workdir / f"{name}{i}")
            for i, run in enumerate((one, replace(one, layout=TRAINER)))
        )
        result[name] = {
            "params": max(jax.tree.leaves(jax.tree.map(distance, spread.params, alone.params))),
            "moved": max(jax.tree.leaves(jax.tree.map(distance, alone.params, params))),
            "grad_norm": [spread.metrics["grad_norm"], alone.metrics["grad_norm"]],
            "rollout_kl": [spread.metrics["rollout_kl"], alone.metrics["rollout_kl"]],
        }
    return result


def distance(a: Any, b: Any) -> float:
    a, b = np.asarray(a), np.asarray(b)
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)) if np.linalg.norm(b) else 0.0


if __name__ == "__main__":
    main()
