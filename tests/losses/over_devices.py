"""Run by test_gspo.py on several virtual devices: the loss of sharded rows against that of the same rows on one."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mindjax.losses.gspo import gspo_loss
from mindjax.losses.off_policy import OffPolicyConfig, divergence, off_policy_weights


@partial(jax.jit, static_argnames="level")
def everything(
    logp: Any, old: Any, rollout: Any, ref: Any, mask: Any, ids: Any, advantages: Any, *, level: str
) -> tuple[Any, Any]:
    def loss(logp: Any) -> Any:
        names = {"response_ids": ids, "num_responses": advantages.shape[0]}
        weights, _ = off_policy_weights(old, rollout, mask, OffPolicyConfig(level), **names)  # type: ignore[arg-type]
        out = gspo_loss(logp, old, mask, advantages, eps_low=0.1, eps_high=0.2, level=level, weights=weights,
                        dual_clip=2.0, logp_ref=ref, kl="k3", kl_coefficient=0.3, **names)  # type: ignore[arg-type]  # fmt: skip
        return out.sum / out.count, (out, divergence(old, rollout, mask))

    (_, out), gradient = jax.value_and_grad(loss, has_aux=True)(logp)
    return gradient, out


def main() -> None:
    rng = np.random.default_rng(0)
    rows, length = 8, 10
    # Two responses in each row but the last, which has none.
    ids = np.where(np.arange(length) < 5, 1, 2)[None] + 2 * np.arange(rows)[:, None]
    ids = rng.permutation(2 * rows + 1)[ids - 1] * (np.arange(rows) < rows - 1)[:, None]
    mask = ((rng.random(ids.shape) < 0.8) & (ids > 0)).astype(np.float32)
    logp = -3 * rng.random((rows, length))
    old, rollout, ref = (logp + spread * rng.normal(size=logp.shape) for spread in (0.4, 0.5, 0.5))
    arrays = [jnp.asarray(x, jnp.float32) for x in (logp, old, rollout, ref, mask)] + [jnp.asarray(ids, jnp.int32)]
    advantages = jnp.asarray(rng.normal(size=2 * rows), jnp.float32)
    assert len(jax.devices()) == 4
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    sharded = [jax.device_put(x, NamedSharding(mesh, PartitionSpec("data"))) for x in arrays]
    for level in ("sequence", "token"):
        gradient, out = everything(*arrays, advantages, level=level)
        over_devices, other = everything(*sharded, advantages, level=level)
        assert len(over_devices.sharding.device_set) == 4, "the gradient of the rows must lie where the rows are"
        error = np.linalg.norm(np.asarray(over_devices) - np.asarray(gradient))
        assert error <= 1e-6 * np.linalg.norm(np.asarray(gradient)), error
        jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-6, atol=1e-6), out, other)
        print(level)


if __name__ == "__main__":
    main()
