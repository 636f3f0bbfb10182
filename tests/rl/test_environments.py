"""Conversations with an environment: what is rendered, sampled, masked and trained, turn after turn."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
import pytest

from mindjax.data.packing import BatchShape, SampleSize, pack, size_of
from mindjax.data.positions import positions_from_tokens
from mindjax.data.render import Rendered, render
from mindjax.inference.generate import stop_token_ids
from mindjax.inference.sampler import SamplingConfig, generate, sampling_keys
from mindjax.models import qwen3_vl
from mindjax.rl.environments import Environment, Step, message_size, pictures, play, turn_keys
from mindjax.rl.objective import GSPOLoss
from mindjax.rl.rollout import PolicyBatch, Response, pack_responses
from mindjax.rl.shapes import smallest, trajectory_shape, turn_shapes
from mindjax.rl.tools import MAX_ANSWER, MAX_CHARACTERS, Access, InvalidCall, Tool, Toolbox, frozen, parse_call
from mindjax.types import Completion, Sample, Trajectory
from tests.inference.compiled import compilations
from tests.rl import tiny

SAMPLES = 3
SAMPLING = SamplingConfig(max_new_tokens=4, num_samples=SAMPLES)


@pytest.fixture(scope="module")
def policy() -> tuple[Any, ...]:
    return tiny.policy()


class Native:
    """The sampler as an engine, with shapes known beforehand."""

    def __init__(self, config: Any, params: Any, shapes: dict[int, tuple[BatchShape, ...]]):
        self.config, self.params, self.shapes = config, params, shapes
        self.calls: list[tuple[int, int]] = []

    def update(self, params: Any, version: int) -> None:
        self.params = params

    def generate(self, prompts: Sequence[Rendered], sampling: SamplingConfig, keys: Any) -> list[list[Completion]]:
        self.calls.append((len(prompts), sampling.num_samples))
        shape = smallest(self.shapes[sampling.num_samples], prompts)
        return generate(self.params, self.config, prompts, sampling=sampling, keys=keys, shape=shape)

    def close(self) -> None:
        pass


class Script:
    """Says the next of some answers to each prompt, whatever it is."""

    def __init__(self, processor: Any, turns: list[list[str]], *, end: bool = True):
        self.processor, self.turns, self.end = processor, turns, end
        self.seen: list[list[Rendered]] = []

    def update(self, params: Any, version: int) -> None:
        pass

    def generate(self, prompts: Sequence[Rendered], sampling: SamplingConfig, keys: Any) -> list[list[Completion]]:
        assert keys.shape == (len(prompts), sampling.num_samples)
        texts = iter(self.turns[len(self.seen)])
        self.seen.append(list(prompts))
        return [[self.completion(next(texts)) for _ in range(sampling.num_samples)] for _ in prompts]

    def completion(self, text: str) -> Completion:
        tokens = (*self.processor.encode_text(text), *([self.processor.im_end_token_id] if self.end else []))
        return Completion(tokens, tuple(-0.5 - 0.1 * i for i in range(len(tokens))), "stop" if self.end else "length")

    def close(self) -> None:
        pass


class Looks:
    """Answers every turn with a picture of noise, up to `turns` times; its noise is its own random numbers'."""

    def __init__(self, rng: np.random.Generator, turns: int):
        self.rng, self.left = rng, turns

    def reset(self, sample: Sample) -> Any:
        return sample.messages[:-1]

    def step(self, text: str) -> Step:
        if text == "done" or not self.left:
            return Step()
        self.left -= 1
        image = self.rng.integers(0, 255, (16, 16, 3)).astype(np.uint8)
        parts = [{"type": "image", "image": image}, {"type": "text", "text": f"after {len(text)}"}]
        return Step({"role": "user", "content": parts}, frozenset({"invalid"}) if text == "bad" else frozenset())


def looking(processor: Any, turns: int, max_turns: int) -> Environment:
    image = np.zeros((16, 16, 3), np.uint8)
    parts = [{"type": "image", "image": image}, {"type": "text", "text": "after 100000"}]
    largest = message_size({"role": "user", "content": parts}, processor)
    return Environment(lambda rng: Looks(rng, turns), max_turns, largest)


def rolled(policy: tuple[Any, ...], environment: Environment, *, step: int = 0, places: Any = range(4)) -> Any:
    """(engine, prompts, trajectories) of a rollout by the tiny model; most of its turns are cut, so few may end."""
    config, params, processor = policy
    prompts = [environment.prompt(i, sample, processor) for i, sample in enumerate(tiny.samples())]
    sizes = [size_of(prompt.rendered) for prompt in prompts]
    shapes = turn_shapes(sizes, config, environment, prompts=4, samples=SAMPLES, max_new_tokens=4)
    engine = Native(config, params, shapes)
    sampling = replace(SAMPLING, stop_token_ids=stop_token_ids(processor))
    chosen = [prompts[i] for i in places]
    return engine, chosen, play(engine, chosen, sampling, 0, step, environment=environment, processor=processor)


@pytest.fixture(scope="module")
def talkative(policy: tuple[Any, ...]) -> tuple[Any, ...]:
    """The tiny model, made to end about every other turn early, so that there are later ones."""
    config, params, processor = policy
    prompts = [render(s.messages[:-1], processor, add_generation_prompt=True) for s in tiny.samples()[:4]]
    shape = BatchShape(4, 64, 4, 16, config.vision.patch_dim)
    hidden = qwen3_vl.forward(params, config, pack([[prompt] for prompt in prompts], shape)).hidden
    mean = np.mean([hidden[i, len(prompt.tokens) - 1] for i, prompt in enumerate(prompts)], axis=0)
    embed = np.array(params["text"]["embed"])
    embed[processor.im_end_token_id] = 6.5 * mean / (mean @ mean)
    return config, {**params, "text": {**params["text"], "embed": jax.numpy.asarray(embed)}}, processor


@pytest.fixture(scope="module")
def rollout(talkative: tuple[Any, ...]) -> tuple[Any, ...]:
    """(environment, engine, prompts, trajectories), with two answers to each conversation that goes on."""
    environment = looking(talkative[2], 2, 3)
    return (environment, *rolled(talkative, environment))


def flat(played: Sequence[Sequence[Trajectory]]) -> list[Trajectory]:
    return [trajectory for row in played for trajectory in row]


def turns(trajectory: Trajectory) -> int:
    return sum(segment.author == "policy" for segment in trajectory.segments)


# --- what a trajectory is ---


def test_a_trajectory_is_its_prompt_and_its_segments(policy: tuple[Any, ...]) -> None:
    """Token by token as sampled, even where the text would be tokenized otherwise."""
    _, _, processor = policy
    environment = looking(processor, 2, 3)
    engine = Script(processor, [["co", "bad"], ["colour now", "done"], ["red"]])
    spelt = tuple(processor.tokenizer.convert_tokens_to_ids(list("colour")))
    assert len(processor.encode_text("colour")) < len(spelt)
    real = engine.completion

    def letter_by_letter(text: str) -> Completion:
        if text != "colour now":
            return real(text)
        tokens = (*spelt, *processor.encode_text(" now"), processor.im_end_token_id)
        return Completion(tokens, tuple(-0.01 * i for i in range(len(tokens))), "stop")

    engine.completion = letter_by_letter  # type: ignore[method-assign]
    sample = tiny.samples()[1]
    prompt = environment.prompt(7, sample, processor)
    ((first, second),) = play(
        engine, [prompt], replace(SAMPLING, num_samples=2), 0, 0, environment=environment, processor=processor
    )
    assert [(s.author, s.text) for s in first.segments] == [
        ("policy", "co"), ("environment", "[image]after 2"), ("policy", "colour now"),
        ("environment", "[image]after 10"), ("policy", "red"),
    ]  # fmt: skip
    assert first.text == "red" and first.flags == frozenset() and second.flags == {"invalid"}
    assert first.segments[2].token_ids[: len(spelt)] == spelt
    assert second.text == "done" and turns(second) == 2

    tokens = [t for segment in first.segments for t in segment.token_ids]
    assert first.rendered.tokens.tolist() == [*prompt.rendered.tokens.tolist(), *tokens]
    policys = [segment.author == "policy" for segment in first.segments for _ in segment.token_ids]
    assert first.rendered.loss_mask.tolist() == [0.0] * len(prompt.rendered.tokens) + [float(p) for p in policys]
    assert first.policy_tokens == sum(policys)
    logprobs = [p for s in first.segments for p in (s.logprobs or [0.0] * len(s.token_ids))]
    np.testing.assert_allclose(first.logprobs, [0.0] * len(prompt.rendered.tokens) + logprobs, rtol=1e-6)
    assert [s.logprobs for s in first.segments if s.author == "environment"] == [(), ()]

    # What the template writes around the pictures and words, and their positions, as if rendered at once.
    rng = np.random.default_rng((0, 0, 7, 0))  # seed, step, prompt and sample
    images = [rng.integers(0, 255, (16, 16, 3)).astype(np.uint8) for _ in range(2)]

    def looked(image: Any, text: str) -> Any:
        return {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}

    whole = render(
        [
            sample.messages[0], {"role": "assistant", "content": "co"}, looked(images[0], "after 2"),
            {"role": "assistant", "content": "colour now"}, looked(images[1], "after 10"),
            {"role": "assistant", "content": "red"},
        ],
        processor,
    )  # fmt: skip
    assert processor.tokenizer.decode(whole.tokens).rstrip("\n") == processor.tokenizer.decode(first.rendered.tokens)
    for (ours, grid), (theirs, other) in zip(first.rendered.frames, whole.frames, strict=True):
        assert grid == other
        np.testing.assert_array_equal(ours, theirs)
    grids = [grid for _, grid in first.rendered.frames]
    recomputed = positions_from_tokens(first.rendered.tokens, grids, processor)
    np.testing.assert_array_equal(first.rendered.positions, recomputed)
    assert first.rendered.next_position == recomputed.max() + 1
    # What a message adds is known beforehand, to the token.
    size = SampleSize(len(first.segments[1].token_ids), (len(first.rendered.frames[1][0]),))
    assert message_size(looked(images[0], "after 2"), processor) == size
    # The prompt's picture is one array for both, so that it is encoded once.
    assert first.rendered.frames[0][0] is second.rendered.frames[0][0]
    assert first.rendered.frames[1][0] is not second.rendered.frames[1][0]
    assert (first.rendered.frames[1][0] != second.rendered.frames[1][0]).any(), "each has random numbers of its own"


def test_how_conversations_end(policy: tuple[Any, ...]) -> None:
    _, _, processor = policy
    prompt = looking(processor, 9, 2).prompt(0, tiny.samples()[0], processor)

    def one(environment: Environment, script: Script) -> Trajectory:
        sampling = replace(SAMPLING, num_samples=1)
        (row,) = play(script, [prompt], sampling, 0, 0, environment=environment, processor=processor)
        return row[0]

    endless = one(looking(processor, 9, 2), Script(processor, [["a"], ["b"]]))
    assert endless.flags == {"overturn"} and endless.segments[-1].author == "policy" and turns(endless) == 2
    assert one(looking(processor, 1, 2), Script(processor, [["a"], ["b"]])).flags == frozenset(), "done in its last"
    assert one(looking(processor, 9, 1), Script(processor, [["a"]])).flags == {"overturn"}
    cut = one(looking(processor, 9, 2), Script(processor, [["a"]], end=False))
    assert cut.flags == {"cut"} and turns(cut) == 1
    circles = Script(processor, [["a"]])
    circles.completion = lambda text: Completion(processor.encode_text(text), (-1.0,), "redundant")  # type: ignore[method-assign]
    circling = one(looking(processor, 9, 2), circles)
    assert circling.flags == {"redundant"} and turns(circling) == 1
    script = Script(processor, [["a"]])
    script.completion = lambda text: Completion((processor.endoftext_token_id,), (-1.0,), "stop")  # type: ignore[method-assign]
    assert one(looking(processor, 9, 2), script).flags == {"invalid"}
    with pytest.raises(ValueError, match=r"more than its largest_message says \(\d+ and \(\)\)"):
        small = replace(looking(processor, 9, 2), largest_message=SampleSize(99))
        one(small, Script(processor, [["a"], ["b"]]))
    with pytest.raises(ValueError, match="at least one turn"):
        looking(processor, 1, 0)


class Drawn:
    """Is over after a turn, which it flags; knows the sample that it began with."""

    def __init__(self, rng: np.random.Generator):
        self.number, self.sample = rng.random(), None

    def reset(self, sample: Sample) -> Any:
        self.sample = sample
        return sample.messages[:-1]

    def step(self, text: str) -> Step:
        return Step(flags=frozenset({"invalid" if self.sample is None else self.sample.id}))


def test_an_environment_begins_with_its_sample_and_flags_its_last_step(policy: tuple[Any, ...]) -> None:
    """Its random numbers follow from seed, step, prompt and number: no two conversations share them."""
    _, _, processor = policy
    made: list[Drawn] = []

    def make(rng: np.random.Generator) -> Drawn:
        made.append(Drawn(rng))
        return made[-1]

    environment = Environment(make, 2, SampleSize(0))
    prompts = [environment.prompt(i, sample, processor) for i, sample in enumerate(tiny.samples()[:2])]
    made.clear()
    for seed, step in ((0, 0), (0, 1), (1, 0), (1, 1)):
        script = Script(processor, [["a"] * 2 * SAMPLES])
        played = play(script, prompts, SAMPLING, seed, step, environment=environment, processor=processor)
        assert [t.flags for t in flat(played)] == [{prompt.sample.id} for prompt in prompts for _ in range(SAMPLES)]
    assert len({env.number for env in made}) == len(made) == 4 * 2 * SAMPLES


def test_a_message_is_held_to_each_of_its_bounds() -> None:
    environment = Environment(lambda rng: Looks(rng, 0), 1, SampleSize(10, (8, 4)))
    for size in (SampleSize(10, (8, 8)), SampleSize(0), SampleSize(10, (4,))):
        environment.check(size)
    for size in (SampleSize(11), SampleSize(10, (9,)), SampleSize(10, (4, 4, 4))):
        with pytest.raises(ValueError, match="more than its largest_message says"):
            environment.check(size)


def test_pictures_are_found_in_order_and_by_path() -> None:
    image = np.zeros((16, 16, 3), np.uint8)
    parts = [{"type": "text", "text": "two"}, {"type": "image", "path": "a.png"}, {"type": "image", "image": image}]
    found = pictures([{"role": "system", "content": "look"}, {"role": "user", "content": parts}])
    assert found[0] == "a.png" and found[1] is image and len(found) == 2


def test_without_an_answer_it_is_a_plain_rollout(talkative: tuple[Any, ...], rollout: tuple[Any, ...]) -> None:
    """The same tokens and log-probabilities from the same keys, as the loop of single answers has them."""
    _, engine, prompts, played = rollout
    environment = looking(talkative[2], 0, 3)
    _, _, alone = rolled(talkative, environment)
    for row, longer in zip(alone, played, strict=True):
        for trajectory, other in zip(row, longer, strict=True):
            assert turns(trajectory) == 1
            first = trajectory.segments[0]
            assert first.token_ids == other.segments[0].token_ids and first.logprobs == other.segments[0].logprobs
    sampling = replace(SAMPLING, stop_token_ids=stop_token_ids(talkative[2]))
    keys = sampling_keys(0, 0, [prompt.index for prompt in prompts], SAMPLES)
    plain = Native(engine.config, engine.params, engine.shapes).generate(
        [prompt.rendered for prompt in prompts], sampling, keys
    )
    assert [[c.token_ids for c in row] for row in plain] == [[t.segments[0].token_ids for t in row] for row in alone]


# --- the sampler and the trainer see the same ---


def test_logprobs_are_those_of_the_whole_sequence(talkative: tuple[Any, ...], rollout: tuple[Any, ...]) -> None:
    """The trainer's forward over all turns, the pictures that came later included, and packed two to a row."""
    config, params, _ = talkative
    environment, engine, prompts, played = rollout
    longest = [t for t in flat(played) if turns(t) > 1]
    assert len(longest) >= 4 and any(turns(t) == 3 for t in longest), "too few conversations went on to test anything"
    assert engine.calls[0] == (4, SAMPLES) and [n for _, n in engine.calls[1:]] == [1] * (len(engine.calls) - 1)
    assert len(engine.calls) <= 3, "one call a turn"
    sizes = [size_of(prompt.rendered) for prompt in prompts]
    shape = trajectory_shape(
        sizes, config, environment, responses=4 * SAMPLES, samples=SAMPLES, per_row=2, max_new_tokens=4
    )
    everything = flat(played)
    batch = pack([[t.rendered for t in everything[i : i + 2]] for i in range(0, len(everything), 2)], shape)
    logp = np.asarray(jax.jit(lambda p, b: qwen3_vl.token_logprobs(p, config, b).logp)(params, batch))
    for number, trajectory in enumerate(everything):
        row, segment = divmod(number, 2)
        mine = np.asarray(batch.segment_ids[row]) == segment + 1
        mask = trajectory.rendered.loss_mask > 0
        np.testing.assert_allclose(logp[row, mine][mask], trajectory.logprobs[mask], atol=1e-4)


def test_only_the_policys_tokens_train(talkative: tuple[Any, ...], rollout: tuple[Any, ...]) -> None:
    """dL/dlogp of the loop's own loss is zero wherever the environment, the prompt or padding stands."""
    policy, slope = slopes(talkative, rollout, counts=lambda t: True)
    sampled = np.asarray(policy.batch.loss_mask) > 0
    authors = [
        [0] * (len(t.rendered.tokens) - sum(len(s.token_ids) for s in t.segments))
        + [1 + (s.author == "policy") for s in t.segments for _ in s.token_ids]
        for t in flat(rollout[3])
    ]
    for row, written in enumerate(authors):
        np.testing.assert_array_equal(sampled[row, : len(written)], np.asarray(written) == 2)
    assert any(1 in written for written in authors)
    assert (slope[~sampled] == 0).all()
    assert (slope[sampled] != 0).all()


def test_an_overturn_row_has_no_gradient(talkative: tuple[Any, ...]) -> None:
    """Excluded from the loss, a conversation that used up its turns weighs nothing, the others as before."""
    environment = looking(talkative[2], 9, 2)
    rollout = (environment, *rolled(talkative, environment))
    over = np.asarray(["overturn" in t.flags for t in flat(rollout[3])])
    assert over.any() and not over.all()
    _, every = slopes(talkative, rollout, counts=lambda t: True)
    assert (np.abs(every[over]).sum(1) > 0).all()
    policy, slope = slopes(talkative, rollout, counts=lambda t: "overturn" not in t.flags)
    assert (slope[over] == 0).all()
    np.testing.assert_array_equal(slope[~over], every[~over])
    assert not np.asarray(policy.batch.loss_mask)[over].any()


def slopes(talkative: tuple[Any, ...], rollout: tuple[Any, ...], counts: Any) -> tuple[PolicyBatch, np.ndarray]:
    """A trajectory a row, and dL/dlogp [B, T] of the loss that the loop trains with."""
    config, params, _ = talkative
    environment, _, prompts, played = rollout
    rng = np.random.default_rng(0)
    responses = [Response(t, float(rng.normal()), counts(t)) for t in flat(played)]
    sizes = [size_of(prompt.rendered) for prompt in prompts]
    shape = trajectory_shape(
        sizes, config, environment, responses=len(responses), samples=SAMPLES, per_row=1, max_new_tokens=4
    )
    policy, _ = pack_responses(responses, shape, 1)
    loss = GSPOLoss(config, 0.2, 0.2, "sequence", 1.0, "none")
    real = qwen3_vl.token_logprobs

    def moved(delta: jax.Array) -> jax.Array:
        def forward(*args: Any, **options: Any) -> Any:
            out = real(*args, **options)
            return replace(out, logp=out.logp + delta)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(qwen3_vl, "token_logprobs", forward)
            (terms, *_) = loss(params, policy)
        return terms.sum

    return policy, np.asarray(jax.jit(jax.grad(moved))(np.zeros(policy.batch.tokens.shape, np.float32)))


# --- keys and shapes ---


def test_a_trajectory_depends_on_its_own_keys_alone(talkative: tuple[Any, ...], rollout: tuple[Any, ...]) -> None:
    environment, _, _, played = rollout
    _, _, other = rolled(talkative, environment, places=[2, 0])
    for place, row in zip([2, 0], other, strict=True):
        for a, b in zip(row, played[place], strict=True):
            assert [s.token_ids for s in a.segments] == [s.token_ids for s in b.segments]
            for (mine, _), (theirs, _) in zip(a.rendered.frames, b.rendered.frames, strict=True):
                np.testing.assert_array_equal(mine, theirs)


def test_no_two_turns_share_keys() -> None:
    keys = sampling_keys(3, 5, range(4), 2)
    live = [(p, n) for p in range(4) for n in range(2)]
    drawn = [keys.reshape(-1, 1)] + [turn_keys(keys, turn, live) for turn in (1, 2, 3)]
    # What the sampler makes of a key for the numbers of its tokens is no key of another turn either.
    drawn.append(jax.vmap(lambda i: jax.random.fold_in(keys[0, 0], i))(np.arange(64, dtype=np.uint32))[:, None])
    data = np.concatenate([np.asarray(jax.random.key_data(k)).reshape(-1, 2) for k in drawn])
    assert len(np.unique(data, axis=0)) == len(data) == 8 * 4 + 64
    some = turn_keys(keys, 2, [(3, 1), (0, 0)])
    assert some.shape == (2, 1)
    np.testing.assert_array_equal(jax.random.key_data(some[0]), jax.random.key_data(drawn[2][7]))


def test_later_steps_compile_nothing(talkative: tuple[Any, ...], rollout: tuple[Any, ...]) -> None:
    """However many conversations are still live: a few shapes serve all, and then nothing is new."""
    environment, live = rollout[0], set()
    for step in range(9):
        with compilations() as compiled:
            places = [(step + i) % 8 for i in range(4)]
            engine, _, _ = rolled(talkative, environment, step=step, places=places)
        if step > 3:
            assert compiled == [], f"step {step}"
            live |= {count for count, samples in engine.calls if samples == 1}
    assert len(live) >= 4, "the number of live conversations hardly changed"
    assert sum(map(len, engine.shapes.values())) <= 3


def test_shapes_hold_the_largest_rollout(policy: tuple[Any, ...]) -> None:
    config, _, processor = policy
    environment = looking(processor, 9, 4)
    prompts = [environment.prompt(i, sample, processor) for i, sample in enumerate(tiny.samples())]
    sizes = [size_of(prompt.rendered) for prompt in prompts]
    shapes = turn_shapes(sizes, config, environment, prompts=2, samples=SAMPLES, max_new_tokens=4)
    assert shapes.keys() == {SAMPLES, 1} and all(shape.rows == 2 * SAMPLES for shape in shapes[1])
    assert [shape.length for shape in shapes[1]] == sorted(shape.length for shape in shapes[1])
    largest = sorted(prompts, key=lambda p: (len(p.rendered.frames), len(p.rendered.tokens)))[-2:]
    script = Script(processor, [["abc"] * 2 * SAMPLES] * 4)  # three tokens and the end
    assert len(processor.encode_text("abc")) == 3
    played = play(script, largest, SAMPLING, 0, 0, environment=environment, processor=processor)
    assert all(turns(t) == 4 and t.flags == {"overturn"} for t in flat(played))
    for turn, rendered in enumerate(script.seen):
        shape = smallest(shapes[1 if turn else SAMPLES], rendered)
        pack([[one] for one in rendered], shape)
    options = {"samples": SAMPLES, "per_row": 1, "max_new_tokens": 4}
    shape = trajectory_shape(sizes, config, environment, responses=2 * SAMPLES, **options)
    pack([[t.rendered] for t in flat(played)], shape)
    # A group that is split over two micro-batches.
    shape = trajectory_shape(sizes, config, environment, responses=2, **options)
    pack([[t.rendered] for t in flat(played)[2:4]], shape)


# --- tools ---


def counter(access: Access) -> Tool:
    schema = {
        "type": "object",
        "properties": {"by": {"type": "integer", "minimum": 1}},
        "required": ["by"],
        "additionalProperties": False,
    }

    def run(state: Any, arguments: Any) -> int:
        state["count"] += arguments["by"]
        return state["count"]

    return Tool(f"add_{access.name.lower()}", schema, access, run, "adds")


@dataclass(frozen=True)
class Held:
    """Part of a state, whose own contents could be changed."""

    pixels: np.ndarray


def test_a_reader_cannot_write() -> None:
    """Neither a READ tool that tries to, nor a caller with READ access through a WRITE tool."""
    state: dict[str, Any] = {"count": 0, "list": [1], "pixels": np.zeros(3), "deep": {"set": {1}}}
    tools = [counter(Access.READ), counter(Access.WRITE)]
    reader, writer = Toolbox(tools), Toolbox(tools, Access.WRITE)
    with pytest.raises(TypeError, match="does not support item assignment"):
        reader.call(state, "add_read", {"by": 2})
    with pytest.raises(TypeError, match="does not support item assignment"):
        writer.call(state, "add_read", {"by": 2})
    with pytest.raises(InvalidCall, match=r"you may only read, not call 'add_write'; you may call add_read$"):
        reader.call(state, "add_write", {"by": 2})
    assert state["count"] == 0
    assert writer.call(state, "add_write", {"by": 2}) == 2 and state["count"] == 2
    assert [d["function"]["name"] for d in reader.definitions] == ["add_read"]
    assert [d["function"]["name"] for d in writer.definitions] == ["add_read", "add_write"]
    shown = frozen(state)
    for write in (
        lambda: shown["list"].append(1), lambda: shown["deep"].update(a=1), lambda: shown["deep"]["set"].add(2),
        lambda: shown["pixels"].__setitem__(0, 1.0),
    ):  # fmt: skip
        with pytest.raises((AttributeError, ValueError)):
            write()
    nested = frozen([[np.zeros(3)], Held(np.zeros(3))])
    for pixels in (nested[0][0], nested[1].pixels):
        with pytest.raises(ValueError, match="read-only"):
            pixels[0] = 1.0
    with pytest.raises(TypeError, match="is plain data"):
        frozen({"file": object()})


def test_no_fuzzed_call_writes_through_a_reader() -> None:
    rng = np.random.default_rng(0)
    state = {"count": 0}
    reader = Toolbox([counter(Access.WRITE)])
    names, values = (
        ["add_write", "add_read", "ADD_WRITE", "", "add_write ", "__class__"],
        [1, 0, -1, "1", None, [], 1.0],
    )
    for _ in range(10_000):
        call = {"name": names[rng.integers(len(names))], "arguments": {"by": values[rng.integers(len(values))]}}
        with pytest.raises(InvalidCall):
            parsed = parse_call(f"<tool_call>{json.dumps(call)}</tool_call>")
            assert parsed is not None
            reader.call(state, *parsed)
    assert state == {"count": 0}


def test_calls_are_held_to_the_schema() -> None:
    writer, state = Toolbox([counter(Access.WRITE)], Access.WRITE), {"count": 0}
    for arguments in ({}, {"by": 0}, {"by": "1"}, {"by": True}, {"by": 1.5}, {"by": 1, "more": 2}, [1], None):
        with pytest.raises(InvalidCall, match=r"^add_write: .* does not fit"):
            writer.call(state, "add_write", arguments)
    with pytest.raises(InvalidCall, match="there is no tool 'sub'; you may call add_write"):
        writer.call(state, "sub", {"by": 1})
    assert state == {"count": 0}
    with pytest.raises(ValueError, match="no JSON schema"):
        Tool("t", {"type": "objekt"}, Access.READ, lambda s, a: None)
    with pytest.raises(ValueError, match="of type 'object'"):
        Tool("t", {"type": "array"}, Access.READ, lambda s, a: None)
    with pytest.raises(ValueError, match="different names"):
        Toolbox([counter(Access.READ)] * 2)


def test_a_refusal_is_short_whatever_was_called() -> None:
    """`MAX_ANSWER` bounds the shapes of rollouts."""
    schema = {"type": "object", "additionalProperties": {"type": "integer"}}
    tools = [Tool(f"a_tool_of_some_length_{n}", schema, Access.READ, lambda s, a: None) for n in range(20)]
    for name, arguments in (("x" * 500, {}), (tools[0].name, {"x" * 500: "1"})):
        with pytest.raises(InvalidCall) as refusal:
            Toolbox(tools).call({}, name, arguments)
        assert 40 < len(str(refusal.value)) <= MAX_ANSWER


def test_calls_are_parsed_or_refused_with_a_reason() -> None:
    assert parse_call("the answer is 7") is None
    assert parse_call('hm <tool_call>\n{"name": "f", "arguments": {"x": [1]}}\n</tool_call>') == ("f", {"x": [1]})
    ok = '{"name": "f", "arguments": {}}'
    for body in (
        "{", "[]", "7", '{"name": "f"}', '{"name": 1, "arguments": {}}', '{"name": "f", "arguments": []}',
        '{"name": "f", "arguments": {"x": NaN}}', '{"name": "f", "arguments": {"x": -Infinity}}', "[" * 5000,
        '{"name": "f", "arguments": {"x": ' + "9" * 5000 + "}}", ok + ok, "x" * 20_000, ok + "<tool_call>" + ok,
        ok + "</tool_call><tool_call>" + ok, '{"name": "f", "arguments": {}, "id": 1}',
    ):  # fmt: skip
        with pytest.raises(InvalidCall):
            parse_call(f"<tool_call>{body}</tool_call>")
    for text in (f"<tool_call>{ok}", f"<tool_call>{ok}</tool_call> and <tool_call>"):
        with pytest.raises(InvalidCall, match="one call"):
            parse_call(text)
    call = f"<tool_call>{ok}</tool_call>"
    assert parse_call(call.ljust(MAX_CHARACTERS)) == ("f", {})
    with pytest.raises(InvalidCall, match="at most 10000 characters"):
        parse_call(call.ljust(MAX_CHARACTERS + 1))
