"""The training step: exact gradient accumulation, clipping, update, in one compiled function."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import lru_cache, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mindjax.config import ModelConfig
from mindjax.models.moe import RouterStats
from mindjax.train.optimizer import OptimizerConfig, join, make_optimizer, multipliers, split_trainable
from mindjax.train.state import TrainState
from mindjax.types import Array, LossOutput

Params = dict[str, Any]
# Terms that are summed, each divided by its own count over the whole step. Counts must depend on the batch alone.
Terms = tuple[LossOutput, ...]
LossFn = Callable[[Params, Any], LossOutput | Terms]
Metrics = dict[str, tuple[Array, Array]]
Maxima = dict[str, Array]


class TrainStep:
    """One compiled step; the state's buffers are donated.

    The gradient is that of sum over terms of (sum over micro-batches of `sum`) / (sum over micro-batches of `count`):
    a split into other micro-batches changes rounding, nothing else.
    """

    def __init__(self, loss_fn: LossFn, optimizer: OptimizerConfig, compute_dtype: str):
        self._loss_fn, self._config, self._dtype = loss_fn, optimizer, jnp.dtype(compute_dtype)
        self._compiled = jax.jit(self._step, donate_argnums=0)
        self._spread = lru_cache(maxsize=4)(self._spread_for)

    def __call__(
        self,
        state: TrainState,
        batches: Any,
        learning_rate: float,
        limits: tuple[float, float] = (float("inf"), float("inf")),
    ) -> tuple[TrainState, Metrics]:
        """Runs one step; returns before the device is done.

        Where the loss or the gradient's norm is not finite, or above its limit, the update is left out: parameters
        and optimizer state stay, only `step` counts on.

        Args:
          state: donated.
          batches: a pytree whose leaves have a leading axis of micro-batches.
          learning_rate: of this step.
          limits: of loss and gradient norm.

        Returns:
          (new state, metrics as name -> (sum, count) on the device: `loss`, what the loss terms report, `grad_norm`
          before clipping, and `skipped`, 1 where the update was left out).
        """
        rate, bounds = jax.device_put(np.float32(learning_rate)), jax.device_put(np.asarray(limits, np.float32))
        return self._function(state)(state, _on_device(batches), rate, bounds)

    def lower(self, state: TrainState, batches: Any) -> jax.stages.Lowered:
        """The step for arguments of these shapes and places, which may be abstract, ready to be compiled."""
        scalars = jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.float32)
        return self._function(state).lower(state, batches, *scalars)

    def compilations(self) -> int:
        """How many shapes have been compiled on one device: one, unless the caller's shapes change."""
        return self._compiled._cache_size()  # type: ignore[attr-defined]

    def _function(self, state: TrainState) -> Any:
        """The jitted step; on a mesh, one whose new state lies where the old one does."""
        leaves, tree = jax.tree.flatten(jax.tree.map(lambda leaf: leaf.sharding, state))
        return self._compiled if len(leaves[0].device_set) == 1 else self._spread(tuple(leaves), tree)

    def _spread_for(self, leaves: tuple[Any, ...], tree: Any) -> Any:
        return jax.jit(self._step, donate_argnums=0, out_shardings=(jax.tree.unflatten(tree, leaves), None))

    def _step(self, state: TrainState, batches: Any, learning_rate: Array, limits: Array) -> tuple[TrainState, Metrics]:
        factors = multipliers(self._config, state.params)
        trainable, frozen = split_trainable(state.params, factors)
        gradient, loss, metrics = self._gradient(trainable, frozen, batches)
        norm = optax.global_norm(gradient)
        good = jnp.isfinite(loss) & jnp.isfinite(norm) & (loss <= limits[0]) & (norm <= limits[1])
        if self._config.clip_norm:
            scale = jnp.minimum(1.0, self._config.clip_norm / jnp.maximum(norm, 1e-12))
            gradient = jax.tree.map(lambda g: g * scale, gradient)
        optimizer = make_optimizer(self._config, state.params)

        def update(gradient: Params, trainable: Params, opt_state: Any) -> tuple[Params, Any]:
            updates, opt_state = optimizer.update(gradient, opt_state, trainable)
            return jax.tree.map(lambda p, u: p - learning_rate * u, trainable, updates), opt_state

        # Chosen here, where the old values are at hand: the host learns of it when they are gone.
        trainable, opt_state = _update_if(good, update, gradient, trainable, state.opt_state)
        one = jnp.ones((), jnp.float32)
        metrics = {"loss": (loss, one), **metrics, "grad_norm": (norm, one), "skipped": (1.0 - good, one)}
        return TrainState(join(trainable, frozen), opt_state, state.step + 1, state.key), metrics

    def _gradient(self, trainable: Params, frozen: Params, batches: Any) -> tuple[Params, Array, Metrics]:
        """Gradient, loss and metrics over all micro-batches."""
        size = len(jax.tree.leaves(batches)[0])
        frozen = _cast(frozen, self._dtype)

        def terms_of(trainable: Params, batch: Any) -> Terms:
            return _terms(self._loss_fn(join(_cast(trainable, self._dtype), frozen), batch))

        def objective(trainable: Params, batch: Any, totals: tuple[Array, ...] | None) -> tuple[Array, Any]:
            terms = terms_of(trainable, batch)
            totals = totals or tuple(term.count for term in terms)
            loss = sum(
                (
                    term.sum / jnp.maximum(jax.lax.stop_gradient(total), 1.0)
                    for term, total in zip(terms, totals, strict=True)
                ),
                jnp.zeros((), jnp.float32),
            )
            return loss, (_metrics_of(terms), _maxima_of(terms))

        gradient_of = jax.value_and_grad(objective, has_aux=True)
        if size == 1:
            (loss, (metrics, maxima)), gradient = gradient_of(trainable, jax.tree.map(lambda x: x[0], batches), None)
            return gradient, loss, metrics | _as_metrics(maxima)

        # Counts come first, so that each micro-batch's gradient can be divided by the totals as it is made. They do
        # not depend on parameters; the compiler drops the forward pass from this loop.
        totals = jax.lax.map(lambda batch: tuple(term.count for term in terms_of(trainable, batch)), batches)
        totals = tuple(jnp.sum(total) for total in totals)

        def accumulate(carry: Any, batch: Any) -> tuple[Any, None]:
            (loss, (metrics, maxima)), gradient = gradient_of(trainable, batch, totals)
            sums, largest = carry
            sums = jax.tree.map(jnp.add, sums, (gradient, loss, metrics))
            return (sums, jax.tree.map(jnp.maximum, largest, maxima)), None

        first = jax.eval_shape(lambda: gradient_of(trainable, jax.tree.map(lambda x: x[0], batches), totals))
        (loss, (metrics, maxima)), gradient = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)
        maxima = jax.tree.map(lambda x: jnp.full_like(x, -jnp.inf), maxima)
        ((gradient, loss, metrics), maxima), _ = jax.lax.scan(accumulate, ((gradient, loss, metrics), maxima), batches)
        return gradient, loss, metrics | _as_metrics(maxima)


class EvalStep:
    """The metrics of a batch without gradient or update, compiled."""

    def __init__(self, loss_fn: LossFn, compute_dtype: str):
        self._loss_fn, self._dtype = loss_fn, jnp.dtype(compute_dtype)
        self._compiled = jax.jit(self._metrics)

    def __call__(self, params: Params, batches: Any) -> Metrics:
        """Sums and counts over micro-batches, see `TrainStep`; nothing is donated."""
        return self._compiled(params, _on_device(batches))

    def _metrics(self, params: Params, batches: Any) -> Metrics:
        params = _cast(params, self._dtype)

        def metrics(batch: Any) -> tuple[Metrics, Maxima]:
            terms = _terms(self._loss_fn(params, batch))
            return _metrics_of(terms), _maxima_of(terms)

        sums, maxima = jax.lax.map(metrics, batches)
        return jax.tree.map(lambda x: x.sum(axis=0), sums) | _as_metrics({k: x.max(axis=0) for k, x in maxima.items()})


def router_term(router: RouterStats, model: ModelConfig) -> LossOutput:
    """The load-balancing loss of all layers as a term, times its coefficient; per sequence and layer.

    Metrics: `router_balance`, the loss before the coefficient (the number of experts per token when balanced), and
    `router_peak`, the load of the busiest expert over the mean load (1 when balanced), averaged over layers.
    """
    total, count = jnp.sum(router.aux_sum), jnp.sum(router.aux_count)
    load = jax.lax.stop_gradient(router.load)
    peak = jnp.max(load, axis=-1) / jnp.maximum(jnp.mean(load, axis=-1), 1.0)
    metrics = {
        "router_balance": (jax.lax.stop_gradient(total), count),
        "router_peak": (jnp.sum(peak), jnp.float32(peak.size)),
    }
    return LossOutput(model.text.router_aux_loss_coef * total, count, metrics)


def _update_if(good: Array, update: Callable[..., Any], gradient: Params, trainable: Params, opt_state: Any) -> Any:
    """`update(gradient, trainable, opt_state)` where `good`, else the (trainable, opt_state) given.

    On a CPU as a branch: in a choice element by element, loops that read the moments run beside those that overwrite
    them, for which XLA copies all moments first. On a GPU a branch would wait for the host.
    """

    def branch(*state: Any) -> Any:
        return jax.lax.cond(good, update, lambda _, trainable, opt_state: (trainable, opt_state), *state)

    def choice(gradient: Params, *old: Any) -> Any:
        return jax.tree.map(lambda new, old: jnp.where(good, new, old), update(gradient, *old), old)

    return jax.lax.platform_dependent(gradient, trainable, opt_state, cpu=branch, default=choice)


def _terms(output: LossOutput | Terms) -> Terms:
    return (output,) if isinstance(output, LossOutput) else output


def _metrics_of(terms: Terms) -> Metrics:
    return reduce(lambda a, b: a | b, (term.metrics for term in terms), {})


def _maxima_of(terms: Terms) -> Maxima:
    return reduce(lambda a, b: a | b, (term.maxima for term in terms), {})


def _as_metrics(maxima: Maxima) -> Metrics:
    return {name: (value, jnp.ones((), jnp.float32)) for name, value in maxima.items()}


def _cast(params: Params, dtype: jnp.dtype) -> Params:
    return jax.tree.map(lambda p: p.astype(dtype), params)


@lru_cache(maxsize=32)
def eval_step(loss_fn: Hashable, compute_dtype: str = "float32") -> EvalStep:
    """The evaluation counterpart of `train_step`, shared in the same way."""
    return EvalStep(loss_fn, compute_dtype)  # type: ignore[arg-type]


@lru_cache(maxsize=32)
def _train_step(loss_fn: Hashable, optimizer: OptimizerConfig, compute_dtype: str) -> TrainStep:
    return TrainStep(loss_fn, optimizer, compute_dtype)  # type: ignore[arg-type]


def train_step(loss_fn: LossFn, optimizer: OptimizerConfig, compute_dtype: str = "float32") -> TrainStep:
    """The step for a loss; the same arguments give the same compiled object, so later stages compile nothing.

    `loss_fn` identifies itself by equality: pass the same function, or a frozen dataclass with `__call__`. Learning
    rate, warm-up and schedule do not count, they are the caller's to compute (`optimizer.learning_rate`).
    """
    return _train_step(loss_fn, optimizer.static(), compute_dtype)


def _on_device(batches: Any) -> Any:
    """Host arrays to the device; the arrays of a mesh are there, and may be of other processes too."""
    placed = all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(batches))
    return batches if placed else jax.device_put(batches)
