"""Distances between answers: exact, lexical, and by a classifier."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindjax.rl.distance import DistanceConfig, exact, lexical

TEXTS = st.lists(st.text("abc 红蓝.", max_size=8), min_size=1, max_size=6)


def test_exact_sees_through_case_spacing_and_a_full_stop() -> None:
    texts = ["Top  left.", "top left", "top right", "7", "07", "红。", "红", "caf\u00e9", "Cafe\u0301 .", "ß", "SS"]
    kinds = np.array([0, 0, 1, 2, 3, 4, 4, 5, 5, 6, 6])
    expected = (kinds[:, None] != kinds[None]).astype(np.float32)
    np.testing.assert_array_equal(DistanceConfig("exact").build()(texts), expected)


def test_lexical_is_one_minus_the_cosine_of_counts_of_characters() -> None:
    # ab: a b | ^a ab b$ | ^ab ab$;  b: b | ^b b$ | ^b$ -- one of 7 and one of 4 in common
    assert lexical(["ab", "b"])[0, 1] == pytest.approx(1 - 2 / np.sqrt(7 * 4))
    # aa: a a | ^a aa a$ | ^aa aa$, the a counted twice
    assert lexical(["aa", "a"])[0, 1] == pytest.approx(1 - (2 + 1 + 1) / np.sqrt((4 + 5) * 4))


def test_lexical_equals_scikit_learns() -> None:
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.metrics.pairwise import cosine_distances

    texts = ["a red circle", "a circle, red", "the blue square in the corner", "红色的圆", "3.14", "a red circle."]
    marked = [f"\x02{text.rstrip('.')}\x03" for text in texts]
    table = CountVectorizer(analyzer="char", ngram_range=(1, 3), lowercase=False)
    counts = table.fit_transform(marked).toarray()
    keep = [name not in ("\x02", "\x03") for name in table.get_feature_names_out()]
    np.testing.assert_allclose(lexical(texts), cosine_distances(counts[:, keep]), atol=1e-12)


def test_texts_of_the_same_runs_are_not_nearer_than_the_same() -> None:
    """Two orders of one multiset of triples, whose cosine rounds to more than 1."""
    assert lexical(["abjgkabihab", "abihabjgkab"])[0, 1] >= 0


def test_the_default_tells_answers_apart_and_not_their_spelling() -> None:
    """What the families reply, and two long answers that differ in a word."""
    distance = DistanceConfig().build()
    different = [
        "red circle",
        "blue circle",
        "red square",
        "34",
        "37",
        "left",
        "top left",
        "bottom left",
        "top right",
        "是",
    ]
    different += ["否", "yellow triangle", "A", "B", "A B C", "A B D"]
    np.testing.assert_array_equal(distance(different), 1 - np.eye(len(different)))
    long = "The largest digit in the picture is the one in the middle, as nine is more than"
    assert not distance(["red circle", "Red circle.", "red circles", "a red circle", "the red circle"]).any()
    assert distance(["a red circle", "red circle, left"])[0, 1] == 1  # 0.26, just past the threshold
    assert not distance([f"{long} four.", f"{long} five."]).any()


def test_the_threshold_parts_similar_from_different() -> None:
    texts = ["red circle", "red square", "blue square"]
    measured = lexical(texts)
    for threshold in (0.0, 0.3, float(measured[0, 1]), 0.9, 1.0):
        result = DistanceConfig(threshold=threshold).build()(texts)
        expected = measured if threshold == 0 else (measured >= threshold) & ~np.eye(3, dtype=bool)
        assert result.dtype == np.float32
        np.testing.assert_allclose(result, expected, rtol=1e-6)


@settings(deadline=None)
@given(texts=TEXTS, seed=st.integers(0, 9), threshold=st.sampled_from([0.0, 0.5, 1.0]))
def test_properties(texts: list[str], seed: int, threshold: float) -> None:
    order = np.random.default_rng(seed).permutation(len(texts))
    for config in (DistanceConfig("lexical", threshold=threshold), DistanceConfig("exact")):
        table = config.build()(texts)
        assert table.shape == (len(texts), len(texts)) and not np.diag(table).any()
        assert ((table >= 0) & (table <= 1)).all() and (table == table.T).all()
        shuffled = config.build()([texts[i] for i in order])
        np.testing.assert_allclose(shuffled, table[np.ix_(order, order)], atol=1e-6)
    same = exact(texts) == 0
    assert not lexical(texts)[same].any()


def test_a_classifier_is_asked_once_for_each_pair_of_different_texts_and_both_orders_count() -> None:
    asked: list[tuple[str, str]] = []

    def load(folder: str) -> object:
        assert folder == "somewhere"

        def classify(pairs: Sequence[tuple[str, str]]) -> np.ndarray:
            asked.extend(pairs)
            return np.array([0.9 if a < b else 0.3 for a, b in pairs])

        return classify

    config = DistanceConfig("classifier", "somewhere", threshold=0.0)
    table = config.build(load)(["b", "a", "B.", "c"])  # type: ignore[arg-type]
    expected = np.where(np.array([0, 1, 0, 2])[:, None] != np.array([0, 1, 0, 2]), 1 - 0.6, 0)
    np.testing.assert_allclose(table, expected, rtol=1e-6)
    assert sorted(asked) == sorted((a, b) for a in "abc" for b in "abc" if a != b)
    strict = DistanceConfig("classifier", "somewhere", threshold=0.41).build(load)  # type: ignore[arg-type]
    assert not strict(["a", "b"]).any()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random DeBERTa-v2 with a tokenizer of bytes, as transformers saves them."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification, PreTrainedTokenizerFast

    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    vocabulary = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    words = Tokenizer(models.BPE(vocabulary, [], unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]"
    )
    torch.manual_seed(0)
    config = DebertaV2Config(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        relative_attention=True, position_biased_input=False, pos_att_type=["p2c", "c2p"], type_vocab_size=0,
        initializer_range=0.5, num_labels=2,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("classifier")
    DebertaV2ForSequenceClassification(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_a_classifier_folder_is_read_through_transformers(folder: Path) -> None:
    """Against one pair at a time, put together by hand; padding to the longest of a batch changes nothing."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from mindjax.interop.pair_classifier import load

    texts = ["red", "a red circle in the corner", "红"]
    table = DistanceConfig("classifier", str(folder), threshold=0.0).build(load)(texts)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def same(a: str, b: str) -> float:
        one, two = (tokenizer.encode(text, add_special_tokens=False) for text in (a, b))
        with torch.no_grad():
            logits = model(torch.tensor([[1, *one, 2, *two, 2]])).logits[0].double()
        return float(logits[1].exp() / logits.exp().sum())

    for i, a in enumerate(texts):
        for j, b in enumerate(texts):
            expected = 0.0 if i == j else 1 - (same(a, b) + same(b, a)) / 2
            assert table[i, j] == pytest.approx(expected, abs=1e-6)
    assert np.ptp(table[np.triu_indices(3, 1)]) > 1e-3  # it does tell pairs apart
    assert load(str(folder))([]).shape == (0,)
    # Batches of one, and texts longer than what is read.
    pairs = [("red", "blue"), ("red " * 300, "blue " * 300)]
    np.testing.assert_allclose(load(str(folder), batch=1)(pairs), load(str(folder))(pairs), atol=1e-6)
    assert load(str(folder), max_tokens=8)([pairs[1]]).shape == (1,)


@pytest.mark.parametrize("labels", [1, 3])
def test_one_label_rises_with_likeness_and_three_are_refused(folder: Path, tmp_path: Path, labels: int) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    from mindjax.interop.pair_classifier import load

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(folder, num_labels=labels))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    if labels == 3:
        with pytest.raises(ValueError, match="has 3 labels; it needs 2"):
            load(str(tmp_path))
        return
    pairs = [("red", "blue"), ("a red circle", "红")]
    with torch.no_grad():
        logits = [float(model.eval()(**tokenizer(a, b, return_tensors="pt")).logits) for a, b in pairs]
    assert abs(logits[0]) > 1e-3
    np.testing.assert_allclose(load(str(tmp_path))(pairs), 1 / (1 + np.exp(-np.array(logits))), atol=1e-6)


def test_a_folder_that_holds_no_classifier_is_refused(folder: Path, tmp_path: Path) -> None:
    from transformers import DebertaV2Model

    from mindjax.interop.pair_classifier import load

    with pytest.raises(ValueError, match=r"holds no config\.json"):
        load(str(tmp_path))
    DebertaV2Model.from_pretrained(folder).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no trained classifier, it lacks classifier\.bias"):
        load(str(tmp_path))


def test_a_config_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        DistanceConfig(threshold=1.5)
    for kind, folder in (("classifier", ""), ("lexical", "somewhere")):
        with pytest.raises(ValueError, match="needs a folder"):
            DistanceConfig(kind, folder)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"mindjax\.interop\.pair_classifier\.load"):
        DistanceConfig("classifier", "somewhere").build()


def test_the_choice_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    DistanceConfig("lexical", threshold=0.25).build()
    assert "lexical, different from 0.25 on" in capsys.readouterr().out
    DistanceConfig("classifier", "here").build(lambda folder: lambda pairs: np.zeros(len(pairs)))
    assert "classifier of here" in capsys.readouterr().out
