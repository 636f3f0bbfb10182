"""Environments: something that answers the policy, and the rollouts of conversations with it.

P prompts, N trajectories of each, R live ones of a turn.

A turn of all live trajectories is one call of the engine. What was sampled is never tokenized again, what the
environment says is tokenized once, and positions are computed over the whole sequence by the function that rendering
uses. So the trainer's forward over a trajectory gives the log-probabilities that it was sampled with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import jax
import numpy as np

from mindjax.data.packing import SampleSize, size_of
from mindjax.data.processor import Processor
from mindjax.data.render import Rendered, append_completion, append_message, render
from mindjax.inference.sampler import SamplingConfig, sampling_keys
from mindjax.rl.engine import RolloutEngine
from mindjax.rl.rollout import FLAG_OF_FINISH, Prompt, reply_text
from mindjax.types import Array, Completion, Sample, Segment, Trajectory

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Step:
    """What an environment makes of a turn of the policy.

    Attributes:
      message: its answer, a chat message; None where the conversation is over.
      flags: for `Trajectory.flags`, e.g. "invalid" after a call that could not be done.
    """

    message: Message | None = None
    flags: frozenset[str] = frozenset()

    @property
    def done(self) -> bool:
        return self.message is None


class Env(Protocol):
    """One conversation's partner. It lives as long as one trajectory."""

    def reset(self, sample: Sample) -> Sequence[Message]:
        """Begins with a sample; returns what the policy sees first, which depends on the sample alone."""

    def step(self, text: str) -> Step:
        """Answers a turn of the policy, whose text comes without the token that ended it."""


@dataclass(frozen=True)
class Environment:
    """What a loop needs to know of the environments that it plays with.

    Attributes:
      make: a new `Env`, with random numbers of its own, which follow from seed, step, prompt and sample.
      max_turns: of the policy; a conversation that is not over then is "overturn".
      largest_message: bounds every message of the environment (`message_size`), so that shapes are known beforehand.
      tools: JSON schemas of functions that the chat template shows, as in HF.
    """

    make: Callable[[np.random.Generator], Env]
    max_turns: int
    largest_message: SampleSize
    tools: tuple[Mapping[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if self.max_turns < 1:
            raise ValueError(f"an environment needs at least one turn of the policy, max_turns is {self.max_turns}")

    def check(self, message: SampleSize) -> None:
        """Raises ValueError for a message that the shapes were not chosen for."""
        most = self.largest_message
        if (
            message.tokens > most.tokens
            or len(message.frames) > len(most.frames)
            or max(message.frames, default=0) > max(most.frames, default=0)
        ):
            raise ValueError(
                f"the environment's message has {message.tokens} tokens and pictures of {message.frames} patches, more "
                f"than its largest_message says ({most.tokens} and {most.frames})"
            )

    def prompt(self, index: int, sample: Sample, processor: Processor) -> Prompt:
        """What the policy sees first; for `Prompt.of` see `mindjax.rl.rollout`."""
        messages = self.make(np.random.default_rng(0)).reset(sample)
        rendered = render(messages, processor, add_generation_prompt=True, tools=self.tools or None)
        return Prompt(index, sample, rendered, pictures(messages))


def pictures(messages: Sequence[Message]) -> tuple[Any, ...]:
    """The images of messages, in order."""
    parts = [part for message in messages if isinstance(message["content"], list) for part in message["content"]]
    return tuple(part.get("image", part.get("path")) for part in parts if part["type"] == "image")


def said(message: Message) -> str:
    """The text of a message, "[image]" where a picture stands."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] if part["type"] == "text" else f"[{part['type']}]" for part in content)


@dataclass
class _Play:
    """A trajectory under way."""

    env: Env
    prompt: Prompt
    environment: Environment
    processor: Processor
    segments: list[Segment] = field(default_factory=list)
    flags: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        self.rendered = self.prompt.rendered
        self.env.reset(self.prompt.sample)

    def take(self, completion: Completion, last: bool) -> bool:
        """Adds a turn of the policy and the answer to it; whether the policy has another turn."""
        text = reply_text(completion, self.processor)
        self.segments.append(Segment("policy", text, completion.token_ids, completion.logprobs))
        self.rendered = append_completion(self.rendered, completion.token_ids)
        self.flags |= frozenset(FLAG_OF_FINISH[completion.finish_reason])
        if completion.finish_reason != "stop":
            return False  # nobody answers half a sentence
        step = self.env.step(text)
        self.flags |= step.flags
        if step.message is None:
            return False
        if completion.token_ids[-1] != self.processor.im_end_token_id:
            # Some other stop token ended the turn: the template could not go on from there.
            self.flags |= {"invalid"}
            return False
        if last:
            self.flags |= {"overturn"}
            return False
        longer = append_message(self.rendered, step.message, self.processor)
        added = tuple(longer.tokens[len(self.rendered.tokens) :].tolist())
        frames = [len(patches) for patches, _ in longer.frames[len(self.rendered.frames) :]]
        self.environment.check(SampleSize(len(added), tuple(frames)))
        self.segments.append(Segment("environment", said(step.message), added))
        self.rendered = longer
        return True

    def trajectory(self) -> Trajectory:
        """What came of it: loss on the policy's tokens alone, whatever the prompt's mask said."""
        mask = np.zeros(len(self.rendered.tokens), np.float32)
        logprobs = np.zeros(len(self.rendered.tokens), np.float32)
        start = len(self.prompt.rendered.tokens)
        for segment in self.segments:
            end = start + len(segment.token_ids)
            if segment.author == "policy":
                mask[start:end], logprobs[start:end] = 1.0, segment.logprobs
            start = end
        assert start == len(mask), "the segments are the whole sequence after the prompt"
        return Trajectory(tuple(self.segments), replace(self.rendered, loss_mask=mask), logprobs, self.flags)


def play(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    sampling: SamplingConfig,
    seed: int,
    step: int,
    *,
    environment: Environment,
    processor: Processor,
) -> list[list[Trajectory]]:
    """`sampling.num_samples` conversations from each prompt.

    A turn that is cut by its length, or goes round in circles, ends its conversation; the environment is not asked. An
    environment that is done after the first turn gives what a rollout without one gives, from the same keys.

    Args:
      engine: holds the policy.
      prompts: of `environment.prompt`, in any order; a trajectory depends on (seed, step, prompt index, its number)
        and the parameters alone.
      sampling: of each turn.
      seed, step: of the run, for the keys.
      environment: who answers.
      processor: renders and decodes.

    Returns:
      For each prompt its trajectories.
    """
    samples = sampling.num_samples
    keys = sampling_keys(seed, step, [prompt.index for prompt in prompts], samples)
    plays = [
        [
            _Play(environment.make(np.random.default_rng((seed, step, p.index, n))), p, environment, processor)
            for n in range(samples)
        ]
        for p in prompts
    ]
    live = [(p, n) for p in range(len(prompts)) for n in range(samples)]
    for turn in range(environment.max_turns):
        if turn == 0:
            groups = engine.generate([prompt.rendered for prompt in prompts], sampling, keys)
            answers = [completion for group in groups for completion in group]
        else:
            longer = [plays[p][n].rendered for p, n in live]
            chosen = turn_keys(keys, turn, live)
            answers = [one for (one,) in engine.generate(longer, replace(sampling, num_samples=1), chosen)]
        last = turn + 1 == environment.max_turns
        live = [(p, n) for (p, n), answer in zip(live, answers, strict=True) if plays[p][n].take(answer, last)]
        if not live:
            break
    return [[one.trajectory() for one in row] for row in plays]


# Added to a turn's number before it is folded into a key: the sampler folds in the numbers of tokens, which stay below.
_TURNS = 1 << 31


def turn_keys(keys: Array, turn: int, live: Sequence[tuple[int, int]]) -> Array:
    """PRNG keys [R, 1] of a later turn, from those of the first.

    Args:
      keys: [P, N] of `sampling_keys`.
      turn: from 1.
      live: (prompt, sample) of each trajectory.
    """
    folded = np.asarray(jax.random.key_data(_fold(keys, np.uint32(_TURNS + turn))))
    # Chosen by NumPy: the number of live trajectories changes, and must compile nothing.
    chosen = folded[[p for p, _ in live], [n for _, n in live]][:, None]
    return jax.random.wrap_key_data(jax.device_put(chosen), impl=jax.random.key_impl(keys))


@jax.jit
def _fold(keys: Array, data: Array) -> Array:
    return jax.vmap(jax.vmap(partial(jax.random.fold_in, data=data)))(keys)


def message_size(message: Message, processor: Processor) -> SampleSize:
    """What a message adds to a conversation, with the header of the next reply."""
    ended = Rendered(
        tokens=np.asarray([processor.im_end_token_id], np.int32),
        loss_mask=np.zeros(1, np.float32),
        positions=np.zeros((1, 3), np.int32),
        modality=np.zeros(1, np.int8),
        frames=(),
        next_position=1,
    )
    whole = size_of(append_message(ended, message, processor))
    return SampleSize(whole.tokens - 1, whole.frames)
