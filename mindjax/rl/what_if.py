"""What each part of the method would do to answers that one makes up: figures for notebooks/02_rl.ipynb.

Every number comes from the function that trains; nothing is computed here a second time. A figure's arguments are
numbers, so that sliders can stand for them.
"""

from __future__ import annotations

import contextlib
import inspect
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from mindjax.losses.gspo import gspo_loss
from mindjax.losses.off_policy import OffPolicyConfig, off_policy_weights
from mindjax.rl import advantages
from mindjax.rl.distance import DistanceConfig, lexical
from mindjax.rl.rewards import RewardConfig, length_reward
from mindjax.train.metrics import read_metrics
from mindjax.types import Sample, Segment, Trajectory

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#2457c5", "#d07a14", "#16805a", "#b0309a", "#0d8fa8")
# Six answers to "name a city in France": two are the same city, two are worded alike and differ.
ANSWERS = ("Paris", "Paris.", "It is Paris", "Lyon", "It is Lyon", "Marseille")


def _axes(panels: int, titles: Sequence[str], x: Sequence[str], y: Sequence[str]) -> tuple[Figure, Any]:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, panels, figsize=(min(4.6 * panels, 14), 3.1), layout="constrained", squeeze=False)
    pyplot.close(figure)  # the cell shows what it returns, once
    for axis, title, below, beside in zip(axes[0], titles, x, y, strict=True):
        axis.set_title(title, loc="left", fontsize=10.5, fontweight="bold")
        axis.set_xlabel(below, fontsize=9)
        axis.set_ylabel(beside, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8.5)
        axis.grid(alpha=0.25, linewidth=0.6)
    return figure, axes[0]


def _correct(answers: int) -> np.ndarray:
    """[answers + 1, answers] rewards, the first c of row c being right."""
    return (np.arange(answers)[None] < np.arange(answers + 1)[:, None]).astype(np.float32)


def pass_at_k(k: int = 4, answers: int = 8) -> Figure:
    """The advantage of a right and of a wrong answer against how many are right, for several k."""
    titles = ("a right answer", "a wrong answer")
    figure, axes = _axes(2, titles, [f"right answers of {answers}"] * 2, ["advantage"] * 2)
    rewards, numbers = _correct(answers), np.arange(answers + 1)
    others = [other for other in (1, 2, 4, 8) if other <= answers and other != k]
    for colour, one in zip(("#0d0f14", *COLOURS), (k, *others), strict=False):
        scores = advantages.pass_at_k(rewards, one)
        style = {"color": colour, "linewidth": 2.4 if one == k else 1.3, "marker": "o", "markersize": 4}
        axes[0].plot(numbers[1:], scores[1:, 0], label=f"k = {one}", **style)
        axes[1].plot(numbers[:-1], scores[:-1, -1], **style)
    axes[0].legend(fontsize=8.5, frameon=False)
    return figure


def estimators(answers: int = 8, k: int = 4) -> Figure:
    """Advantages of the other estimators beside Pass@k's, and how much a whole prompt weighs under each."""
    titles = ("a right answer", "all answers of the prompt")
    figure, axes = _axes(2, titles, [f"right answers of {answers}"] * 2, ["advantage", "sum of |advantage|"])
    rewards, numbers = _correct(answers), np.arange(answers + 1)
    found = {
        "group, over its deviation": advantages.group(rewards, normalize_deviation=True),
        "group": advantages.group(rewards, normalize_deviation=False),
        "rloo": advantages.rloo(rewards),
        "batch of all these prompts": advantages.batch(rewards),
        f"pass@{k}": advantages.pass_at_k(rewards, k),
    }
    for colour, (name, scores) in zip(COLOURS, found.items(), strict=True):
        axes[0].plot(numbers[1:], scores[1:, 0], color=colour, marker="o", markersize=3.5, label=name)
        axes[1].plot(numbers, np.abs(scores).sum(axis=1), color=colour, marker="o", markersize=3.5)
    axes[0].legend(fontsize=8, frameon=False)
    return figure


def diversity(threshold: float = 0.5, answers: Sequence[str] = ANSWERS) -> Figure:
    """Lexical distances between answers, and the factor each gets, pairwise and by partition."""
    titles = (f"different from {threshold:g} on", "factor on a right answer")
    figure, (left, right) = _axes(2, titles, ("", ""), ("", ""))
    measured = lexical(answers)
    with contextlib.redirect_stdout(io.StringIO()):  # a run names its distance in the log; a slider need not
        decided = DistanceConfig(threshold=threshold).build()(answers)
    places = np.arange(len(answers))
    left.imshow(measured, cmap="Blues", vmin=0, vmax=1.6)
    left.grid(visible=False)
    for (row, column), value in np.ndenumerate(measured):
        weight = "bold" if decided[row, column] > 0 else "normal"
        left.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7.5, fontweight=weight)
    left.set_xticks(places, answers, rotation=30, ha="right")
    left.set_yticks(places, answers)
    for offset, mode, colour in ((-0.19, "pairwise", COLOURS[0]), (0.19, "partition", COLOURS[1])):
        factor = advantages.diversity_factor(decided[None], mode)[0]  # type: ignore[arg-type]
        right.barh(places + offset, factor, 0.36, color=colour, label=mode)
    right.set_yticks(places, answers)
    right.invert_yaxis()
    right.set_xlim(0, 1)
    right.legend(fontsize=8.5, frameon=False, loc="lower right", bbox_to_anchor=(1, 0.98), ncols=2)
    return figure


def length(longest: int = 64, soft: int = 16, weight: float = 0.5) -> Figure:
    """The length reward, and the advantages it gives eight right answers that differ in nothing but their length."""
    titles = ("length reward", "eight right answers")
    figure, (left, right) = _axes(2, titles, ("tokens", "tokens"), ("reward", "advantage"))
    tokens = np.arange(longest + 9)
    left.plot(tokens, [length_reward(int(t), longest=longest, soft=soft) for t in tokens], color=COLOURS[0])
    left.axvline(longest, color="#6b7385", linewidth=0.8, linestyle=":")
    eight = np.linspace(longest / 4, longest, 8).round().astype(int)
    shaping = np.asarray([[weight * length_reward(int(t), longest=longest, soft=soft) for t in eight]])
    right.bar(eight, advantages.centred(1 + shaping)[0], width=longest / 16, color=COLOURS[1])
    right.axhline(0, color="#6b7385", linewidth=0.8)
    return figure


def clip(eps_low: float = 0.2, eps_high: float = 0.28, dual_clip: float = 3.0) -> Figure:
    """GSPO's loss and its gradient by the ratio of the whole answer, for an answer that was good and one that was bad.

    The dotted line is without the dual clip; 1 or less leaves it out.
    """
    titles = ("loss", "what a step does to the answer")
    y = ("loss of the answer", "- d loss / d log-probability")
    figure, (left, right) = _axes(2, titles, ["ratio to the policy that sampled"] * 2, y)
    ratios = jnp.linspace(0.3, 4.5, 300)

    def loss(log_ratio: jax.Array, advantage: float, dual: float) -> jax.Array:
        one = jnp.ones((1, 1))
        return gspo_loss(
            one * log_ratio, 0 * one, one, jnp.full(1, advantage),
            eps_low=eps_low, eps_high=eps_high, dual_clip=dual if dual > 1 else 0.0,
        ).sum  # fmt: skip

    both = jax.jit(jax.vmap(jax.value_and_grad(loss), (0, None, None)), static_argnums=2)
    for advantage, name, colour in ((1.0, "advantage +1", COLOURS[2]), (-1.0, "advantage -1", COLOURS[1])):
        for dual, style in ((0.0, ":"), (dual_clip, "-")):
            if dual <= 1 and dual_clip > 1 and advantage > 0:
                continue
            values, slopes = (np.asarray(x) for x in both(jnp.log(ratios), advantage, dual))
            left.plot(ratios, values, color=colour, linestyle=style, label=name if style == "-" else None)
            right.plot(ratios, -slopes, color=colour, linestyle=style)
    for axis in (left, right):
        for edge in (1 - eps_low, 1 + eps_high):
            axis.axvline(edge, color="#6b7385", linewidth=0.7, linestyle="--")
    left.legend(fontsize=8.5, frameon=False)
    return figure


def off_policy(noise: float = 0.05, tokens: int = 64, cap: float = 2.0, floor: float = 0.5) -> Figure:
    """The weight by the ratio, and the weights of 2000 answers whose rollout was off by so much noise per token.

    Args:
      noise: standard deviation of the difference of a token's log-probability, in nats.
      tokens: of an answer.
      cap, floor: see `OffPolicyConfig`.
    """
    titles = ("weight of one answer", f"2000 answers of {tokens} tokens, {noise:g} nats off at each")
    figure, (left, right) = _axes(2, titles, ("ratio, trainer over rollout", "weight"), ("weight", "answers"))
    ratios = jnp.linspace(0.05, 4, 300)
    weigh = jax.jit(off_policy_weights, static_argnums=3)

    def weights(difference: jax.Array, level: str, mode: str) -> np.ndarray:
        config = OffPolicyConfig(level, mode, cap, floor)  # type: ignore[arg-type]
        return np.asarray(weigh(difference, jnp.zeros_like(difference), jnp.ones_like(difference), config)[0])

    for mode, colour in (("truncate", COLOURS[0]), ("mask", COLOURS[1])):
        left.plot(ratios, weights(jnp.log(ratios)[:, None], "sequence", mode), color=colour, label=mode)
    left.legend(fontsize=8.5, frameon=False)
    # Drawn so that the mean of the exact weight is 1, as it is for answers from the rollout's own distribution.
    drawn = noise * jax.random.normal(jax.random.key(0), (2000, tokens)) - noise**2 / 2
    for level, colour in (("sequence", COLOURS[0]), ("geometric", COLOURS[2])):
        right.hist(
            weights(drawn, level, "truncate"), np.linspace(0, cap * 1.02, 52), color=colour, alpha=0.6, label=level
        )
    right.legend(fontsize=8.5, frameon=False)
    return figure


def rewards(
    texts: Sequence[str], sample: Sample, config: RewardConfig, max_new_tokens: int = 32
) -> list[dict[str, float]]:
    """The parts and the total of made-up answers, a character being a token."""
    rows = []
    with config.build(max_new_tokens) as rewarder:
        for text in texts:
            segment = Segment("policy", text, tuple(map(ord, text)), (0.0,) * len(text))
            trajectory = Trajectory((segment,), None, None)
            parts = rewarder.parts(trajectory, sample)
            rows.append({**parts, "total": rewarder.combine(parts, sample).total})
    return rows


def multiple(trajectory: Trajectory, sample: Sample) -> dict[str, float]:
    """Right where the first token's number divides by 8: random weights hit it one time in eight, and learn it fast.

    `RewardConfig(custom=("mindjax.rl.what_if:multiple",))` rewards it.
    """
    del sample
    return {"correct": float(trajectory.segments[-1].token_ids[0] % 8 == 0)}


def sliders(figure: Callable[..., Figure], **ranges: tuple[float, ...]) -> Any:
    """A figure under a slider for each of its numbers; what it refuses is said in its place.

    Args:
      figure: one of the functions above; its defaults are where the sliders stand.
      ranges: (lowest, highest) or (lowest, highest, step) by the name of an argument; whole numbers stay whole.
    """
    import ipywidgets

    picture, problem = ipywidgets.Image(format="png", layout={"max_width": "100%"}), ipywidgets.Label()
    controls = {}
    for name, (low, high, *step) in ranges.items():
        whole = all(isinstance(number, int) for number in (low, high, *step))
        kind, smallest = (ipywidgets.IntSlider, 1) if whole else (ipywidgets.FloatSlider, 0.1)
        controls[name] = kind(
            value=inspect.signature(figure).parameters[name].default,
            min=low, max=high, step=step[0] if step else smallest, description=name, continuous_update=False,
        )  # fmt: skip

    def draw(_: Any = None) -> None:
        try:
            drawn = figure(**{name: control.value for name, control in controls.items()})
        except ValueError as error:
            problem.value = str(error)
            return
        file = io.BytesIO()
        drawn.savefig(file, dpi=80)
        picture.value, problem.value = file.getvalue(), ""

    for control in controls.values():
        control.observe(draw, "value")
    draw()
    return ipywidgets.VBox([*controls.values(), problem, picture])


def runs(workdirs: Mapping[str, str | Path], keys: Sequence[str], phase: str = "") -> Figure:
    """The metrics of some runs, a panel each.

    Args:
      workdirs: runs by name.
      keys: of metrics.jsonl.
      phase: the run whose Pass@k phase is shaded; "" for none.
    """
    figure, axes = _axes(len(keys), keys, ["step"] * len(keys), [""] * len(keys))
    for colour, (name, workdir) in zip(COLOURS, workdirs.items(), strict=False):
        rows = read_metrics(workdir)
        steps = [row["step"] for row in rows]
        for axis, key in zip(axes, keys, strict=True):
            axis.plot(steps, [row[key] for row in rows], color=colour, label=name)
            if name == phase:
                early = [row["step"] for row in rows if row["phase"] == 0]
                axis.axvspan(0.5, max(early, default=0) + 0.5, color=colour, alpha=0.08, linewidth=0)
    axes[0].legend(fontsize=8.5, frameon=False)
    return figure
