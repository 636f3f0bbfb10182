"""What `mindjax bench rl` measures a step against: Tunix's GRPO learner with the GSPO loss, on its Qwen3.

It runs as a script in an environment of Tunix's own, which holds no mindjax: `tunix_baseline.py SPEC`, a JSON object.
Each line on stdin asks for one step; each step is answered by a line on stdout, as `mindjax.bench` reads them.
"""

from __future__ import annotations

import json
import random
import resource
import sys
import time
from collections.abc import Iterator
from typing import Any

RESULT = "RESULT "  # as in mindjax.bench


class Numbers:
    """A tokenizer whose text is the token ids, so that neither side's time is spent on words."""

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))

    def bos_id(self) -> int:
        return 0  # none is put in front

    def eos_id(self) -> int:
        return 1

    def pad_id(self) -> int:
        return 0


def answer(values: dict[str, Any]) -> None:
    print(RESULT + json.dumps(values), flush=True)


def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """Right or wrong by the first token: some answers of a group are, some are not."""
    return [float(int(text.split()[0]) % 2) for text in completions]


def learner(spec: dict[str, Any]) -> tuple[Any, Any]:
    """(learner, model) with the vanilla rollout, which shares the trainer's weights: nothing is transferred."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx
    from tunix.models.qwen3 import model as qwen3
    from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
    from tunix.rl.rl_cluster import ClusterConfig, RLCluster, RLTrainingConfig, Role
    from tunix.rl.rollout.base_rollout import RolloutConfig

    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        config = qwen3.ModelConfig(**spec["model"], dtype=jnp.float32, param_dtype=jnp.float32)
        model = qwen3.Qwen3(config, rngs=nnx.Rngs(0))
    total = spec["prompt_tokens"] + spec["new_tokens"]
    adamw = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-5, weight_decay=0.01))
    cluster = RLCluster(
        actor=model,
        tokenizer=Numbers(),
        cluster_config=ClusterConfig(
            role_to_mesh={Role.ACTOR: mesh, Role.REFERENCE: mesh, Role.ROLLOUT: mesh},
            training_config=RLTrainingConfig(actor_optimizer=adamw, eval_every_n_steps=10**9, max_steps=10**9),
            rollout_config=RolloutConfig(
                max_tokens_to_generate=spec["new_tokens"],
                max_prompt_length=spec["prompt_tokens"],
                kv_cache_size=total,
                temperature=1.0,
                eos_tokens=[-1],  # no token is this one: every answer has its full length
            ),
        ),
    )
    # One update on a rollout: on policy, its own log-probabilities are the old ones, there as here.
    algorithm = GRPOConfig(
        num_generations=spec["samples"], num_iterations=1, beta=0.0, epsilon=3e-4, loss_algo="gspo-token"
    )
    return GRPOLearner(cluster, algorithm, reward), model


def main(spec: dict[str, Any]) -> None:
    import jax
    import numpy as np
    from flax import nnx

    trainer, model = learner(spec)
    rng, began = random.Random(0), time.perf_counter()

    def batches() -> Iterator[dict[str, Any]]:
        """The learner asks for the next batch when it is through with the last one, and for none in advance."""
        for number in range(sys.maxsize):
            prompts = [
                " ".join(str(rng.randrange(2, spec["model"]["vocab_size"])) for _ in range(spec["prompt_tokens"]))
                for _ in range(spec["prompts"])
            ]
            if number == spec["warm_up"]:
                jax.block_until_ready(nnx.state(model))
                answer({"settings": "float32, vanilla rollout, gspo-token", "warm_up": time.perf_counter() - began})
            if number >= spec["warm_up"] and not sys.stdin.readline():
                return
            wall, processor = time.perf_counter(), time.process_time()
            yield {"prompts": np.asarray(prompts)}
            jax.block_until_ready(nnx.state(model))
            if number >= spec["warm_up"]:
                answer({"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - processor})

    trainer.train(batches())
    answer({"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)})


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
