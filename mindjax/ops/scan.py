"""A scan over stacked layers that stores floats of one and two bytes as integers, or the same layers without a loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mindjax.ops.bits import from_bits, is_small, to_bits

Array = jax.Array
# (carry, layer) -> (carry, outputs of the layer)
Block = Callable[[Any, Any], tuple[Any, Any]]
Leaves = list[Any]

FEW_LAYERS = 12  # up to so many layers there need be no loop: nothing is copied into stacks and out of them


def loops(layers: int, recomputes: bool) -> bool:
    """Whether that many layers need a loop: many, and those that compute again what they did not keep.

    Without a loop between, XLA would find that the second time is the same as the first, and keep it.
    """
    return recomputes or layers > FEW_LAYERS


def scan_layers(block: Block, carry: Any, layers: Any, *, loop: bool = True) -> tuple[Any, Any]:
    """`lax.scan(block, carry, layers)` at a cost that is linear in the number of layers in bfloat16 too.

    XLA's CPU backend converts a whole bfloat16 stack to float32 and back around each slice or update (see
    `mindjax.ops.bits`), so a plain scan, which reads layers and writes what its backward pass needs one slice at a
    time, does work quadratic in depth. Here every stack is kept as integers, which means that the backward scan is
    written out. In other dtypes, and on other backends, this is `lax.scan`.

    Args:
      block: differentiable in the floats of its arguments and in what it closes over; may be wrapped in
        `jax.checkpoint`.
      carry: floats.
      layers: leaves with a leading layer axis, floats and integers.
      loop: see `loops`. Without one, integers of NumPy reach the block as such: what depends on them is decided when
        it is traced.

    Returns:
      (last carry, outputs stacked over layers).
    """
    if not loop:
        return _follow(block, carry, layers)
    small = any(is_small(leaf.dtype) for leaf in jax.tree.leaves((carry, layers)))
    if not small or jax.default_backend() != "cpu":
        return lax.scan(block, carry, layers)
    floats, rest = _partition(layers)
    first = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), layers)
    # As a jaxpr, for it names everything that the block closes over: that too must be an argument, and stored once.
    closed, shapes = jax.make_jaxpr(block, return_shape=True)(carry, first)
    captured, constants = _partition(closed.consts)

    def function(carry: Any, layer: tuple[list[Any], list[Any]], captured: tuple[list[Any], list[Any]]) -> Any:
        leaves = jax.tree.leaves((carry, _join(*layer, layers)))
        out = jax.core.eval_jaxpr(closed.jaxpr, _join(*captured, closed.consts), *leaves)
        return jax.tree.unflatten(jax.tree.structure(shapes), out)

    return _scan(function, shapes[1], carry, floats, captured, (rest, constants))


def _follow(block: Block, carry: Any, layers: Any) -> tuple[Any, Any]:
    leaves, tree = jax.tree.flatten(layers)
    parts = [unstack(leaf) if _is_float(leaf) else list(leaf) for leaf in leaves]
    outputs = []
    for layer in zip(*parts, strict=True):
        carry, out = block(carry, jax.tree.unflatten(tree, layer))
        outputs.append(out)
    return carry, jax.tree.map(lambda *parts: _stack(list(parts)), *outputs)


# Written out, for the gradient of an index is a stack of zeros with one part in it, and there are as many of these to
# add as there are parts.


@jax.custom_vjp
def unstack(stack: Array) -> list[Array]:
    """The parts of a stack of floats along its leading axis."""
    return [from_bits(part, stack.dtype) for part in to_bits(stack)]


@jax.custom_vjp
def _stack(parts: list[Array]) -> Array:
    return from_bits(jnp.stack([to_bits(part) for part in parts]), parts[0].dtype)


unstack.defvjp(lambda stack: (unstack(stack), None), lambda _, parts: (_stack(parts),))
_stack.defvjp(lambda parts: (_stack(parts), None), lambda _, g: (unstack(g),))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan(
    function: Callable[..., Any], shapes: Any, carry: Any, floats: Leaves, captured: Leaves, integers: Any
) -> tuple[Any, Any]:
    rest, constants = integers

    def step(carry: Any, layer: Any) -> tuple[Any, Any]:
        carry, out = function(carry, (_restore(layer[0], floats), layer[1]), (captured, constants))
        return carry, _store(out)

    carry, out = lax.scan(step, carry, (_store(floats), rest))
    return carry, _restore(out, shapes)


@jax.tree_util.register_static
@dataclass(frozen=True, eq=False)
class _Recipe:
    """How a layer's backward function is put together again.

    Attributes:
      tree: its structure.
      sources: for each of its leaves, (name in `_at_hand` or "kept", index).
      kept: dtypes of the leaves that are stored for every layer.
    """

    tree: Any
    sources: tuple[tuple[str, int], ...]
    kept: tuple[Any, ...]


def _forward(
    function: Callable[..., Any], shapes: Any, carry: Any, floats: Leaves, captured: Leaves, integers: Any
) -> Any:
    rest, constants = integers
    recipes: list[_Recipe] = []

    def step(carry: Any, layer: Any) -> tuple[Any, Any]:
        here = _restore(layer[0], floats)
        (carry, out), pull = jax.vjp(
            lambda carry, floats, captured: function(carry, (floats, layer[1]), (captured, constants)),
            carry, here, captured,
        )  # fmt: skip
        leaves, tree = jax.tree.flatten(pull)
        # What is at hand in the backward scan is not stored for every layer.
        at_hand: dict[int, tuple[str, int]] = {}
        for name, values in _at_hand(here, layer[1], captured, constants).items():
            at_hand |= {id(value): (name, i) for i, value in enumerate(values)}
        sources: list[tuple[str, int]] = []
        kept: list[Array] = []
        for leaf in leaves:
            if id(leaf) not in at_hand:
                at_hand[id(leaf)] = ("kept", len(kept))
                kept.append(leaf)
            sources.append(at_hand[id(leaf)])
        recipes.append(_Recipe(tree, tuple(sources), tuple(leaf.dtype for leaf in kept)))
        return carry, (_store(out), [to_bits(leaf) for leaf in kept])

    carry, (out, kept) = lax.scan(step, carry, (_store(floats), rest))
    return (carry, _restore(out, shapes)), (recipes[-1], kept, floats, captured, integers)


def _backward(function: Callable[..., Any], shapes: Any, saved: Any, gradients: Any) -> Any:
    recipe, kept, floats, captured, integers = saved
    rest, constants = integers
    d_carry, d_out = gradients

    def step(carry: Any, layer: Any) -> tuple[Any, Any]:
        d_carry, d_captured = carry
        stored, here_rest, kept, d_out = layer
        values = _at_hand(_restore(stored, floats), here_rest, captured, constants)
        values["kept"] = [from_bits(leaf, dtype) for leaf, dtype in zip(kept, recipe.kept, strict=True)]
        pull = jax.tree.unflatten(recipe.tree, [values[name][index] for name, index in recipe.sources])
        d_carry, d_floats, more = pull((d_carry, _restore(d_out, shapes)))
        return (d_carry, jax.tree.map(jnp.add, d_captured, more)), _store(d_floats)

    start = (d_carry, jax.tree.map(jnp.zeros_like, captured))
    (d_carry, d_captured), d_floats = lax.scan(step, start, (_store(floats), rest, kept, _store(d_out)), reverse=True)
    no_gradient = jax.tree.map(lambda leaf: np.zeros(leaf.shape, jax.dtypes.float0), integers)
    return d_carry, _restore(d_floats, floats), d_captured, no_gradient


_scan.defvjp(_forward, _backward)


def _at_hand(floats: list[Any], rest: list[Any], captured: list[Any], constants: list[Any]) -> dict[str, Sequence[Any]]:
    return {"floats": floats, "rest": rest, "captured": captured, "constants": constants}


def _store(tree: Any) -> Any:
    return jax.tree.map(to_bits, tree)


def _restore(tree: Any, like: Any) -> Any:
    return jax.tree.map(lambda leaf, model: from_bits(leaf, model.dtype), tree, like)


def _partition(layers: Any) -> tuple[list[Any], list[Any]]:
    leaves = jax.tree.leaves(layers)
    return [leaf for leaf in leaves if _is_float(leaf)], [leaf for leaf in leaves if not _is_float(leaf)]


def _join(floats: list[Any], rest: list[Any], like: Any) -> Any:
    leaves, tree = jax.tree.flatten(like)
    floats_left, rest_left = iter(floats), iter(rest)
    return jax.tree.unflatten(tree, [next(floats_left if _is_float(leaf) else rest_left) for leaf in leaves])


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)
