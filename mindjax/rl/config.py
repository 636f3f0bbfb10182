"""What a run of RL may set."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mindjax.losses.off_policy import OffPolicyConfig
from mindjax.rl.distance import DistanceConfig
from mindjax.rl.rewards import RewardConfig
from mindjax.train.optimizer import OptimizerConfig
from sharding.layout import Layout
from sharding.remat import Remat

Exclude = Literal["none", "loss", "stats", "both"]


@dataclass(frozen=True)
class AdvantageConfig:
    """How rewards become advantages, in two phases (sections 4.1 and 4.2 of the MindGPT-4ov report).

    Attributes:
      pass_at_k: share of the steps that the first phase takes, whose advantages are those of Pass@k; 0 leaves it out.
      k: of Pass@k; with c of N answers right, a prompt teaches something where 1 <= c <= N - k.
      entropy_switch: the first phase ends early once the policy's mean entropy (nats per token) falls below this; 0
        goes by the share alone.
      estimator: of the second phase, see `mindjax.rl.advantages`.
      normalize_deviation: of the estimator "group".
      diversity_mode: of the estimator "diversity".
      distance: between answers, for the same.
    """

    pass_at_k: float = 0.0
    k: int = 4
    entropy_switch: float = 0.0
    estimator: Literal["group", "rloo", "batch", "diversity"] = "group"
    normalize_deviation: bool = True
    diversity_mode: Literal["pairwise", "partition"] = "pairwise"
    distance: DistanceConfig = field(default_factory=DistanceConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.pass_at_k <= 1:
            raise ValueError(f"rl: advantage.pass_at_k is a share of the steps, in [0, 1], not {self.pass_at_k}")
        if self.entropy_switch < 0:
            raise ValueError(f"rl: advantage.entropy_switch must not be negative: {self.entropy_switch}")


@dataclass(frozen=True)
class RolloutConfig:
    """How answers are sampled.

    Attributes:
      engine: "native", in this process, or "vllm", in processes of its own.
      weights: of the language model while sampling; 8-bit ones ask for `off_policy`.
      repeat_window, repeat_count, repeat_length: when an answer that goes round in circles is cut and marked, see
        `mindjax.inference.sampler.SamplingConfig`; window 0 looks for nothing.
      overlap: whether the next rollout is sampled while this one trains, from weights that are one step old. The one
        after a checkpoint is not, so that a killed run resumes to the bit.
      devices: how many devices, the last ones, sample and do nothing else; 0 shares the trainer's.
      workers: processes of "vllm".
      layout: of the native engine over the trainer's devices, of data, expert and tensor alone; None takes the
        trainer's with everything but expert and tensor as data, and tensor too where weights have 8 bits.
      urls: vLLM workers that run elsewhere, instead.
    """

    engine: Literal["native", "vllm"] = "native"
    weights: Literal["full", "int8", "fp8"] = "full"
    repeat_window: int = 0
    repeat_count: int = 0
    repeat_length: int = 0
    overlap: bool = False
    devices: int = 0
    layout: Layout | None = None
    workers: int = 1
    urls: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if (self.repeat_window > 0) != (self.repeat_count > 0):
            raise ValueError("rl: set rollout.repeat_window and rollout.repeat_count together, or neither")
        if self.engine == "vllm" and self.devices:
            raise ValueError("rl: rollout.devices are of the native engine; vllm has processes of its own")
        if self.layout is not None and self.devices:
            raise ValueError("rl: rollout.devices samples on devices of its own, rollout.layout on the trainer's")
        if self.layout is not None and self.weights != "full" and self.layout.tensor > 1:
            raise ValueError("rl: 8-bit weights are not split over tensor; set rollout.layout to data and expert")


@dataclass(frozen=True)
class OversampleConfig:
    """Ratio-EMA: more prompts are asked than trained, as many as the share without a lesson makes necessary.

    Attributes:
      largest: times `prompts_per_step` that are asked at most; 1 turns it off.
      decay: weight of the past in the moving average of the ratio.
    """

    largest: float = 1.0
    decay: float = 0.5

    def __post_init__(self) -> None:
        if self.largest < 1 or not 0 <= self.decay < 1:
            raise ValueError(
                f"rl: oversample.largest must be at least 1 and decay in [0, 1), not {self.largest}, {self.decay}"
            )


def frozen_vision() -> OptimizerConfig:
    """A constant small learning rate for the language model alone."""
    return OptimizerConfig(learning_rate=1e-5, schedule="constant", multipliers=(("^vision", 0.0), (".*", 1.0)))


@dataclass(frozen=True)
class RLConfig:
    """One run of GSPO. Every part of the method beyond plain GSPO is off by default.

    Attributes:
      steps: rollouts, each followed by its updates.
      prompts_per_step: trained in a step, drawn without repetition inside an epoch.
      samples_per_prompt: answers to each, the group that advantages compare.
      updates_per_rollout: the rollout's prompts are split over so many updates, one after the other.
      micro_batches: of an update, accumulated exactly.
      responses_per_row: packed into a row of a micro-batch.
      eps_low, eps_high: of the clip; sequence ratios lie close to 1, and answers of a few tokens need larger ones
        than the defaults, which are the GSPO paper's for long answers.
      level: "sequence" or "token", see `gspo_loss`.
      dual_clip, kl, kl_coefficient: see `gspo_loss`; the reference of the KL term is the policy before the first step.
      temperature: of sampling, and of the log-probabilities that are trained.
      max_new_tokens: of an answer, of each turn where there are several.
      reward: see `RewardConfig`.
      advantage: see `AdvantageConfig`.
      off_policy: weights for what was not sampled from exactly the policy that is trained, see `OffPolicyConfig`.
      rollout: see `RolloutConfig`.
      oversample: see `OversampleConfig`.
      exclude_cut: where answers that were cut by their length do not count: in the loss, in their group's statistics.
      exclude_overturn: the same for conversations that used up their turns.
      optimizer: see `OptimizerConfig`; the vision encoder is frozen by default, and what it made of the pictures in a
        rollout is then what the updates train on.
      remat: what a block keeps for its backward pass, see `sharding.remat`.
      layout: how training is spread over devices; changes nothing but rounding.
      dtype: of the computation, in rollouts too; parameters and optimizer stay float32.
      seed: of the order of prompts and of the sampling.
      checkpoint_every: steps; 0 saves at the end alone.
      keep_checkpoints: how many stay.
      evaluate_every: steps between calls of `evaluate`; 0 calls it at the end alone.
      show_every: steps between rollouts that are written out for people to read; 0 writes the first and the last.
    """

    steps: int = 100
    prompts_per_step: int = 16
    samples_per_prompt: int = 8
    updates_per_rollout: int = 1
    micro_batches: int = 1
    responses_per_row: int = 1
    eps_low: float = 3e-4
    eps_high: float = 4e-4
    level: Literal["sequence", "token"] = "sequence"
    dual_clip: float = 0.0
    kl: Literal["none", "k1", "k2", "k3"] = "none"
    kl_coefficient: float = 0.0
    temperature: float = 1.0
    max_new_tokens: int = 64
    reward: RewardConfig = field(default_factory=RewardConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    off_policy: OffPolicyConfig = field(default_factory=OffPolicyConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    oversample: OversampleConfig = field(default_factory=OversampleConfig)
    exclude_cut: Exclude = "none"
    exclude_overturn: Exclude = "none"
    optimizer: OptimizerConfig = field(default_factory=frozen_vision)
    remat: Remat = "none"
    layout: Layout = field(default_factory=Layout)
    dtype: str = "float32"
    seed: int = 0
    checkpoint_every: int = 0
    keep_checkpoints: int = 2
    evaluate_every: int = 0
    show_every: int = 0

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError("rl: temperature must be positive; greedy answers of a prompt are all the same")
        if self.samples_per_prompt < 2:
            raise ValueError("rl: samples_per_prompt must be at least 2, advantages compare the answers to a prompt")
        if self.prompts_per_step % self.updates_per_rollout:
            raise ValueError(
                f"rl: {self.prompts_per_step} prompts_per_step cannot be split over {self.updates_per_rollout} updates"
            )
        if self.responses_per_update % (self.micro_batches * self.responses_per_row):
            raise ValueError(
                f"rl: {self.responses_per_update} responses of an update cannot be split into {self.micro_batches} "
                f"micro_batches of rows of {self.responses_per_row}"
            )
        if self.advantage.pass_at_k and self.advantage.k >= self.samples_per_prompt:
            raise ValueError(
                f"rl: advantage.k is {self.advantage.k} and samples_per_prompt {self.samples_per_prompt}: every prompt "
                "with a right answer would count as solved; take k smaller, or more samples"
            )
        if self.off_policy.level == "token" and self.level != "token":
            raise ValueError("rl: off_policy.level 'token' has a weight for every token, which needs level='token'")
        if self.rollout.overlap and self.off_policy.level == "none":
            raise ValueError(
                "rl: rollout.overlap samples from weights that are one step old; set off_policy.level to correct it"
            )
        if self.micro_batches % self.layout.batch_shards:
            raise ValueError(
                f"rl: the layout takes {self.layout.batch_shards} micro-batches at once (data x fsdp x expert); "
                f"make micro_batches, now {self.micro_batches}, a multiple of it"
            )
        if self.rollout.devices and self.layout.devices > 1:
            raise ValueError("rl: rollout.devices needs a trainer on one device; its layout takes all of them")
        if self.rollout.layout is not None and self.rollout.layout.devices != self.layout.devices:
            raise ValueError(
                f"rl: rollout.layout takes {self.rollout.layout.devices} devices, the trainer's layout "
                f"{self.layout.devices}; the two share them"
            )
        if (self.kl == "none") != (self.kl_coefficient == 0):
            raise ValueError("rl: set kl and kl_coefficient together, or neither")

    @property
    def rollout_layout(self) -> Layout:
        """Of the native engine on the trainer's devices."""
        train = self.layout
        tensor = train.tensor if self.rollout.weights == "full" else 1
        data = train.devices // train.expert // tensor
        return self.rollout.layout or Layout(data=data, expert=train.expert, tensor=tensor)

    @property
    def responses_per_update(self) -> int:
        return self.prompts_per_step // self.updates_per_rollout * self.samples_per_prompt


# What may change when a run is resumed; all else is part of its identity.
FREE_TO_CHANGE = ("checkpoint_every", "keep_checkpoints", "evaluate_every", "show_every", "remat", "layout")
