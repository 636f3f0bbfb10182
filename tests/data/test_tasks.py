import hashlib

import numpy as np
import pytest

from mindjax.data import tasks
from mindjax.data.samples import difficulty_levels
from mindjax.data.tasks import sources
from mindjax.data.tasks.verify import is_right, right_reply
from mindjax.types import Sample

PICTURED = [family for family in tasks.FAMILIES if family != "text_only"]


def picture(sample):
    return next((part["image"] for part in sample.messages[0]["content"] if part["type"] == "image"), None)


def question(sample):
    return sample.messages[0]["content"][-1]["text"]


def items(family, split, count=60):
    return [tasks.FAMILIES[family](split, np.random.default_rng(seed)) for seed in range(count)]


@pytest.mark.parametrize("family", tasks.FAMILIES)
def test_no_source_is_in_both_splits(family):
    train, test = ({s for item in items(family, split) for s in item.sources} for split in sources.SPLITS)
    assert train and test
    assert not train & test


def test_sources_are_split_by_glyph_photograph_and_font():
    train, test = sources.glyphs("train"), sources.glyphs("test")
    assert not set(train.ids) & set(test.ids)
    assert len(set(train.ids)) + len(test.ids) == 1797 and len(test.ids) == sources.TEST_GLYPHS
    assert set(test.labels) == set(range(10))
    for table in (sources.PHOTOGRAPHS, sources.FONTS):
        assert not set(table["train"]) & set(table["test"])


@pytest.mark.parametrize("family", tasks.FAMILIES)
@pytest.mark.parametrize("variant", ["cloze", "choice", "boxed", "ablated", "preference", "ablated_preference"])
def test_every_reference_is_right_and_every_rejected_reply_is_not(family, variant):
    for sample in tasks.build(family, "train", 40, 0, variant):
        assert sample.messages[-1]["role"] == "assistant"
        assert is_right(sample.answer, sample.messages[-1]["content"]), sample
        if "preference" in variant:
            assert sample.rejected is not None and not is_right(sample.answer, sample.rejected), sample
        else:
            assert sample.rejected is None
        assert (picture(sample) is None) == ("ablated" in variant or family == "text_only")


@pytest.mark.parametrize("family", tasks.FAMILIES)
def test_wrong_replies_are_wrong_and_different(family):
    for item in items(family, "test"):
        assert len(item.wrong) >= 2 and len(set(item.wrong)) == len(item.wrong)
        assert not any(is_right(item.answer, wrong) for wrong in item.wrong)


@pytest.mark.parametrize("family", tasks.FAMILIES)
def test_the_same_arguments_give_the_same_samples_and_another_seed_others(family):
    def digest(seed):
        samples = tasks.build(family, "train", 12, seed)
        pixels = [b"" if picture(s) is None else picture(s).tobytes() for s in samples]
        return [
            hashlib.sha256(p + repr(s.messages[-1]).encode()).hexdigest() for s, p in zip(samples, pixels, strict=True)
        ]

    assert digest(3) == digest(3)
    assert digest(3) != digest(4)


@pytest.mark.parametrize("family", tasks.FAMILIES)
def test_items_and_ids_are_unique(family):
    samples = tasks.build(family, "train", 150, 0)
    shown = {(question(s), b"" if picture(s) is None else picture(s).tobytes()) for s in samples}
    assert len(shown) == len({s.id for s in samples}) == 150


def test_asking_for_more_than_there_is_says_so():
    with pytest.raises(ValueError, match=r"only .* different test items"):
        tasks.build("text_only", "test", 100_000, 0)


@pytest.mark.parametrize(("family", "variant"), [("digit_reed", "cloze"), ("digit_read", "clozed")])
def test_unknown_names_are_refused_with_the_known_ones(family, variant):
    with pytest.raises(ValueError, match=r"there is no .*there are"):
        tasks.build(family, "train", 1, 0, variant)


@pytest.mark.parametrize("family", PICTURED)
def test_pictures_are_whole_cells(family):
    """So nothing is resized: what is drawn is what the encoder sees."""
    for sample in tasks.build(family, "test", 5, 0):
        image = picture(sample)
        assert image.dtype == np.uint8 and image.shape[2] == 3
        assert image.shape[0] % sources.CELL == image.shape[1] % sources.CELL == 0


@pytest.mark.parametrize(("family", "columns"), [("digit_read", 3), ("digit_any", 2)])
def test_the_digits_in_the_picture_are_those_of_the_answer(family, columns):
    """Read by an independent reader, a nearest neighbour among *training* glyphs, at the place where they fit best."""
    from sklearn.neighbors import KNeighborsClassifier

    glyphs, size = sources.glyphs("train"), sources.GLYPH_SIZE
    knn = KNeighborsClassifier(1, algorithm="brute").fit(glyphs.ink[::6].reshape(-1, size**2), glyphs.labels[::6])
    hits = []
    for sample in tasks.build(family, "test", 25, 0):
        grey = picture(sample).astype(float).mean(2)
        value = sample.answer["value"]
        for place, digit in enumerate("".join(value)):
            row, column = divmod(place, columns)
            cell = grey[32 * row : 32 * row + 32, 32 * column : 32 * column + 32]
            ink = abs(cell - np.median(cell[:, [0, -1]])) / (np.ptp(cell) + 1e-6)
            at = [ink[y : y + size, x : x + size].ravel() for y in range(7) for x in range(7)]
            distances, which = knn.kneighbors(at)
            best = which[np.argmin(distances[:, 0]), 0]
            hits.append(glyphs.labels[::6][best] == int(digit))
    assert np.mean(hits) > 0.6  # chance is 0.1


def test_a_shape_is_where_the_reply_says():
    reds = {"top left": (0, 0), "top right": (0, 1), "bottom left": (1, 0), "bottom right": (1, 1)}
    found = 0
    for sample in tasks.build("quadrant", "test", 150, 0):
        image = picture(sample).astype(int)
        red = (image[..., 0] > 190) & (image[..., 1] < 60) & (image[..., 2] < 60)
        if red.sum() < 60:
            continue  # a cross of another colour
        y, x = (float(np.mean(axis)) for axis in np.nonzero(red))
        assert (int(y >= 32), int(x >= 32)) == reds[sample.messages[-1]["content"]]
        found += 1
    assert found >= 5


def test_demonstrations_spread_over_all_right_replies():
    samples = tasks.build("digit_any", "train", 300, 0)
    places = [s.answer["value"].index(s.messages[-1]["content"]) for s in samples]
    assert min(np.bincount(places, minlength=3)) > 70
    four = tasks.build("shape_any", "train", 400, 0)
    assert min(np.bincount([s.answer["value"].index(s.messages[-1]["content"]) for s in four], minlength=4)) > 70
    offsets = {int(s.messages[-1]["content"]) - s.answer["value"] for s in tasks.build("locate", "train", 300, 0)}
    assert offsets == set(range(-5, 6))


def test_four_different_shapes_are_right_and_stand_in_their_quarters():
    """Each quarter shows more of the colour that the answer names than any other quarter does."""
    from mindjax.data.tasks.shapes import COLOURS

    hits = []
    for sample in tasks.build("shape_any", "test", 40, 0):
        right = sample.answer["value"]
        assert len(set(right)) == len({name.split()[0] for name in right}) == 4
        image = picture(sample).astype(int)
        assert image.shape == (2 * sources.CELL, 2 * sources.CELL, 3)
        for quarter, name in enumerate(right):
            near = np.abs(image - COLOURS[name.split()[0]]).max(axis=2) < 20
            counts = [near[32 * r : 32 * r + 32, 32 * c : 32 * c + 32].sum() for r in (0, 1) for c in (0, 1)]
            hits.append(int(np.argmax(counts)) == quarter)
    assert np.mean(hits) > 0.95


def test_the_right_replies_of_a_policy_can_be_counted():
    """Different ways to write one reply are one; wrong ones are none."""
    for sample in tasks.build("shape_any", "train", 20, 1):
        right = sample.answer["value"]
        written = [f" {name.upper()}. " for name in right] + [f"a {name}: \\boxed{{{name}}}" for name in right]
        assert [right_reply(sample.answer, reply) for reply in written] == right * 2
        assert right_reply(sample.answer, "purple circle") is None and right_reply(sample.answer, right[0][:-1]) is None
    within = {"kind": "within", "value": 40, "tolerance": 5}
    assert [right_reply(within, reply) for reply in ("42", " 042.", "39", "46")] == ["42", "42", "39", None]
    assert right_reply({"kind": "int", "value": 1200}, "1,200") == "1200"


def test_answers_are_drawn_evenly():
    for family, replies in (("quadrant", 4), ("digit_largest", 3), ("digit_count", 4)):
        counts = np.unique(
            [s.messages[-1]["content"] for s in tasks.build(family, "train", 600, 0)], return_counts=True
        )[1]
        assert len(counts) == replies
        assert counts.min() > 0.7 * counts.mean()


@pytest.mark.parametrize("family", PICTURED)
def test_difficulty_varies_but_says_nothing_about_the_reply(family):
    samples = tasks.build(family, "train", 600, 0)
    difficulty = np.array([s.difficulty for s in samples])
    assert (difficulty > 0).all() and len(set(difficulty.tolist())) > 500
    rank = difficulty.argsort().argsort() / 600
    first = np.array([s.messages[-1]["content"].split()[0][0] for s in samples])
    for reply in set(first):
        some = rank[first == reply]
        assert abs(some.mean() - 0.5) < 5 * np.sqrt(1 / 12 / len(some)), reply


def test_clutter_is_the_background_over_the_contrast():
    canvas = np.full((4, 4, 3), 100.0)
    ink = np.array([40.0, 50.0, 60.0])
    assert sources.clutter(canvas, ink) == 0
    canvas[::2] += 10
    canvas[1::2] -= 10
    assert sources.clutter(canvas, ink) == pytest.approx(10 / 50)


def test_levels_part_each_task_evenly_by_difficulty():
    easy, hard = (
        [Sample((), f"{t}{i}", t, difficulty=s * i) for i in range(12)] for t, s in (("a", 1e-3), ("b", -7.0))
    )
    same = [Sample((), f"c{i}", "c") for i in range(300)]
    levels = difficulty_levels([*easy, *hard, *same], 3)
    assert levels[:12] == [0] * 4 + [1] * 4 + [2] * 4 and levels[12:24] == levels[11::-1]
    # Equally hard ones are spread, whatever the order that they come in.
    assert np.bincount(levels[24:]).tolist() == [100, 100, 100]
    assert np.bincount(levels[24:124], minlength=3).min() > 15
