"""The optimizer: AdamW or Muon, learning rate and freezing per part of the model.

The learning rate of a step is computed on the host (`learning_rate`) and enters the compiled step as an argument, so
stages of different length, peak or schedule share one compiled step. Everything else here is static.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import optax
from optax import contrib

Params = dict[str, Any]

# Leaves that weight decay would pull towards a meaningless zero: norms, biases, and tables that are looked up.
NO_DECAY = r"(norm|scale|bias|(^|/)(position_)?embed)$"
# What Muon is for: hidden-to-hidden matrices. Embeddings, patch projection, head and router stay with Adam.
MUON_MATRICES = (
    r"^vision/(blocks|merger|deepstack_mergers)/.*kernel$|^text/layers/(attn/[qkvo]|mlp/\w+|moe/(gate_up|down))$"
)


@dataclass(frozen=True)
class OptimizerConfig:
    """How parameters are updated.

    Attributes:
      name: "adamw", or "muon": matrices of the blocks by Muon, the rest by AdamW.
      learning_rate: the peak.
      warmup_steps: of linear warm-up, from peak / warmup_steps.
      schedule: after warm-up, "constant", or "linear" or "cosine" decay until the last step.
      final_fraction: of the peak, where a decay ends.
      b1, b2, eps: of Adam.
      weight_decay: decoupled, times the learning rate; not on norms, biases and embedding tables.
      clip_norm: largest global norm of the gradient of all trainable parameters; 0 does not clip.
      multipliers: (pattern, factor) pairs, the pattern searched for (regular expression) in the slash-separated path
        of a parameter, the first match wins, e.g. (("^vision/merger", 0.1), ("^vision", 0), (".*", 1)). Factor 0
        freezes: no gradient is computed and no optimizer state exists. Every parameter needs a match, and every
        pattern must match something.
    """

    name: str = "adamw"
    learning_rate: float = 1e-4
    warmup_steps: int = 0
    schedule: str = "cosine"
    final_fraction: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    multipliers: tuple[tuple[str, float], ...] = ((".*", 1.0),)

    def __post_init__(self) -> None:
        checks = [
            (self.name in ("adamw", "muon"), f"name must be 'adamw' or 'muon', not {self.name!r}"),
            (self.schedule in ("constant", "linear", "cosine"),
             f"schedule must be 'constant', 'linear' or 'cosine', not {self.schedule!r}"),
            (self.learning_rate >= 0, "learning_rate must not be negative"),
            (0 <= self.final_fraction <= 1, "final_fraction must lie in 0..1"),
            (self.warmup_steps >= 0, "warmup_steps must not be negative"),
            (self.clip_norm >= 0, "clip_norm must not be negative; 0 does not clip"),
            (0 <= self.b1 < 1 and 0 <= self.b2 < 1, "b1 and b2 must lie in [0, 1)"),
            (all(factor >= 0 for _, factor in self.multipliers), "a learning-rate multiplier must not be negative"),
        ]  # fmt: skip
        problems = [message for ok, message in checks if not ok]
        if problems:
            raise ValueError("optimizer: " + "; ".join(problems))

    def static(self) -> OptimizerConfig:
        """The same without what only the host uses: equal results may share one compiled step."""
        return replace(self, learning_rate=0.0, warmup_steps=0, schedule="constant", final_fraction=0.0)


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """The learning rate of the step with this number, counted from 0."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    progress = min(1.0, (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps))
    shape = 1 - progress if config.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.learning_rate * (config.final_fraction + (1 - config.final_fraction) * shape)


def path_of(path: tuple[Any, ...]) -> str:
    """The slash-separated name of a parameter."""
    return "/".join(str(key.key) for key in path)


def multipliers(config: OptimizerConfig, params: Params) -> Params:
    """The learning-rate multiplier of every parameter, as a tree of floats.

    Raises:
      ValueError: a parameter that no pattern covers, or a pattern that decides for no parameter.
    """
    used: set[int] = set()
    uncovered: list[str] = []

    def match(path: tuple[Any, ...], _: Any) -> float:
        name = path_of(path)
        for index, (pattern, factor) in enumerate(config.multipliers):
            if re.search(pattern, name):
                used.add(index)
                return float(factor)
        uncovered.append(name)
        return 0.0

    factors = jax.tree_util.tree_map_with_path(match, params)
    if uncovered:
        raise ValueError(
            f"no learning-rate pattern covers {', '.join(uncovered[:5])}{' ...' if len(uncovered) > 5 else ''}; "
            "end optimizer.multipliers with ('.*', 1.0) for the rest, or ('.*', 0.0) to freeze it"
        )
    unused = [pattern for index, (pattern, _) in enumerate(config.multipliers) if index not in used]
    if unused:
        raise ValueError(
            f"learning-rate patterns {unused} decide for no parameter: nothing is called so, or an earlier pattern "
            f"takes all (the first match wins). Top-level names: {sorted(params)}"
        )
    return factors


def split_trainable(params: Params, factors: Params) -> tuple[Params, Params]:
    """(trainable, frozen): the same nested dicts, each without the leaves of the other."""

    def keep(tree: Any, factor: Any, trainable: bool) -> Any:
        if isinstance(tree, dict):
            kept = {name: keep(tree[name], factor[name], trainable) for name in tree}
            return {name: value for name, value in kept.items() if value is not None} or None
        return tree if (factor > 0) == trainable else None

    return keep(params, factors, True) or {}, keep(params, factors, False) or {}


def join(trainable: Params, frozen: Params) -> Params:
    """The inverse of `split_trainable`, in the order of sorted names that JAX gives a dict."""
    result = dict(frozen)
    for name, value in trainable.items():
        result[name] = join(value, frozen[name]) if name in frozen else value
    return result


def make_optimizer(config: OptimizerConfig, params: Params) -> optax.GradientTransformation:
    """Moments, weight decay and per-part factors; clipping, the step's learning rate and the sign are `step.py`'s.

    Args:
      config: see `OptimizerConfig`.
      params: all parameters, or their shapes; the result acts on the trainable ones.
    """
    factors = multipliers(config, params)
    trainable, _ = split_trainable(params, factors)
    factors, _ = split_trainable(factors, factors)
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps)
    if config.name == "adamw":
        parts = [adam]
    else:
        labels = _by_name(lambda name: "muon" if re.search(MUON_MATRICES, name) else "adam", trainable)
        parts = [optax.partition({"muon": _muon(), "adam": adam}, labels)]
    if config.weight_decay:
        decayed = _by_name(lambda name: re.search(NO_DECAY, name) is None, trainable)
        parts.append(optax.add_decayed_weights(config.weight_decay, mask=decayed))
    if any(factor != 1.0 for factor in jax.tree.leaves(factors)):
        parts.append(optax.stateless(lambda updates, _: jax.tree.map(lambda u, f: u * f, updates, factors)))
    return optax.chain(*parts)


def _by_name(function: Callable[[str], Any], params: Params) -> Params:
    return jax.tree_util.tree_map_with_path(lambda path, _: function(path_of(path)), params)


def _muon() -> optax.GradientTransformation:
    """Muon on the last two axes, [..., in, out]; the leading ones (layers, experts) are a batch of matrices.

    Updates get the root mean square of AdamW's (0.2, Liu et al. 2025, arXiv:2502.16982), so that one learning rate
    serves both kinds of parameters.
    """

    def axes(updates: Params) -> Params:
        return jax.tree.map(lambda _: contrib.MuonDimensionNumbers(-2, -1), updates)

    def rescale(updates: Params, _: Any) -> Params:
        return jax.tree.map(lambda u: u * (0.2 * math.sqrt(max(u.shape[-2:]))), updates)

    return optax.chain(contrib.scale_by_muon(weight_dimension_numbers=axes), optax.stateless(rescale))
