"""Alignment by character offsets: properties on made-up offsets, and tokenizers that are trained here."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdfast.integrations.alignment import align, align_texts

tokenizers = pytest.importorskip("tokenizers")

TEXT = "The cat's naïve friend 😀😀 unbelievably re-read ﬁve 漢字 lines:\n    return  x + 1  "


# --- Properties -------------------------------------------------------------------------------------------------------


@st.composite
def tokenizations(draw, length):
    """Offsets over the first characters of a text, with gaps, empty spans and characters of several tokens."""
    spans, begin, start = [], 0, 0
    for end in sorted(draw(st.sets(st.integers(1, length), max_size=length))):
        kind = draw(st.sampled_from(["plain", "plain", "gap", "shared", "overlapping", "special"]))
        if kind == "special":
            spans += [draw(st.sampled_from([(0, 0), (begin, begin), (length, length)]))] * draw(st.integers(1, 2))
        low = begin
        if kind == "gap":
            low = draw(st.integers(begin, end - 1))
        elif kind == "overlapping" and begin > start:  # its first bytes belong to the character before
            low = begin - 1
        start = low
        spans += [(low, end)] * (draw(st.integers(1, 3)) if kind == "shared" else 1)
        begin = end
    return spans


def ends(offsets):
    """{character: last token that ends there}, where no later token covers anything before that character."""
    return {
        end: k
        for k, (start, end) in enumerate(offsets)
        if start < end and all(s >= end for s, e in offsets[k + 1 :] if s < e)
    }


@settings(max_examples=200)
@given(st.data(), st.integers(1, 12))
def test_groups_are_minimal_ordered_and_cover_the_same(data, length):
    a, b = data.draw(tokenizations(length)), data.draw(tokenizations(length))
    alignment = align(a, b)
    groups = alignment.groups
    # Every place where both could be cut is the end of a group, so none is missing and none could be smaller.
    shared = sorted(ends(a).keys() & ends(b).keys())
    assert [g.text.stop for g in groups] == shared
    assert [g.text.start for g in groups] == [0, *shared][: len(shared)]
    assert alignment.last_tokens == [(ends(a)[e], ends(b)[e]) for e in shared]
    for side, offsets in (("a", a), ("b", b)):
        taken = [k for g in groups for k in range(getattr(g, side).start, getattr(g, side).stop)]
        assert taken == sorted(set(taken))
        for group in groups:
            tokens = getattr(group, side)
            covering = [k for k, (s, e) in enumerate(offsets) if s < e and group.text.start <= s < group.text.stop]
            assert (tokens.start, tokens.stop - 1) == (covering[0], covering[-1])  # special tokens only inside
            spans = [offsets[k] for k in covering]
            assert min(s for s, _ in spans) >= group.text.start
            assert max(e for _, e in spans) == group.text.stop


@settings(max_examples=200)
@given(st.data(), st.integers(1, 12))
def test_symmetric_and_of_itself(data, length):
    a, b = data.draw(tokenizations(length)), data.draw(tokenizations(length))
    forth, back = align(a, b), align(b, a)
    assert [(g.a, g.b, g.text) for g in forth.groups] == [(g.b, g.a, g.text) for g in back.groups]
    assert align(a, a).last_tokens == [(k, k) for k in ends(a).values()]


# --- Cases ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "last"),
    [
        pytest.param([(0, 5), (5, 11)], [(0, 5), (6, 11)], [(0, 0), (1, 1)], id="leading space in or out"),
        pytest.param([(0, 6), (6, 11)], [(0, 5), (5, 11)], [(1, 1)], id="space after one, before the other"),
        pytest.param([(0, 1)] * 4 + [(1, 2)], [(0, 1), (1, 2)], [(3, 0), (4, 1)], id="four bytes of a character"),
        pytest.param([(0, 1), (0, 2)], [(0, 1), (1, 2)], [(1, 1)], id="a token of two characters' bytes"),
        pytest.param([(0, 0), (0, 3), (0, 0)], [(0, 3)], [(1, 0)], id="special tokens around"),
        pytest.param([(0, 2), (2, 2), (2, 4)], [(0, 4)], [(2, 0)], id="special token inside"),
        pytest.param([(0, 2), (2, 4), (4, 6)], [(0, 2), (2, 4)], [(0, 0), (1, 1)], id="cut off"),
        pytest.param([(0, 2), (2, 3), (3, 4)], [(0, 2), (3, 4)], [(0, 0), (2, 1)], id="a character without a token"),
        pytest.param([(0, 3)], [(0, 2)], [], id="nothing in common"),
        pytest.param([], [(0, 2)], [], id="no tokens"),
        pytest.param([[0, 2]], [[0, 2]], [(0, 0)], id="lists for pairs"),
    ],
)
def test_cases(a, b, last):
    assert align(a, b).last_tokens == last


# --- Tokenizers -------------------------------------------------------------------------------------------------------


def trained(kind):
    """A small tokenizer of a real kind; none knows the characters that are not in its corpus."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    corpus = ["the cat has a friend who reads five lines", "unbelievable and naive: return x + 1", "re-reading"] * 4
    if kind.startswith("byte-level"):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=kind.endswith("trimmed"))
    elif kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=90, special_tokens=["[UNK]", "[CLS]"], show_progress=False)
        tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [CLS]", special_tokens=[("[CLS]", 1)])
    else:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=70, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
        )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


KINDS = ["byte-level", "byte-level-trimmed", "wordpiece", "unigram"]


@pytest.fixture(scope="module")
def tokenizer_of():
    return {kind: trained(kind) for kind in KINDS}


@pytest.mark.parametrize("kind_b", KINDS)
@pytest.mark.parametrize("kind_a", KINDS)
def test_tokenizers(tokenizer_of, kind_a, kind_b):
    a, b = tokenizer_of[kind_a], tokenizer_of[kind_b]
    alignment = align_texts(TEXT, a, b)
    offsets = a.encode(TEXT).offsets, b.encode(TEXT).offsets
    assert alignment.ids_a == a.encode(TEXT).ids
    assert alignment.ids_b == b.encode(TEXT).ids
    assert alignment.groups == align(*offsets).groups
    assert len(alignment.groups) >= 8
    for (i, j), group in zip(alignment.last_tokens, alignment.groups, strict=True):
        assert offsets[0][i][1] == offsets[1][j][1] == group.text.stop
    # joined in order, the groups spell the text up to the last shared end
    spelled = "".join(TEXT[group.text] for group in alignment.groups)
    assert TEXT.startswith(spelled)
    assert spelled.rstrip().endswith("1")


def test_what_the_groups_are(tokenizer_of):
    def parts(kind_a, kind_b, text, **options):
        alignment = align_texts(text, tokenizer_of[kind_a], tokenizer_of[kind_b], **options)
        return [text[group.text] for group in alignment.groups]

    assert parts("byte-level", "wordpiece", "the cat reads") == ["the", " cat", " reads"]
    assert parts("byte-level", "byte-level-trimmed", "a😀😀") == ["a", "😀", "😀"]
    assert parts("byte-level", "unigram", "a😀😀") == ["a", "😀😀"]  # where one token stands for what is unknown
    assert parts("byte-level", "wordpiece", "the cat", add_special_tokens=False) == ["the", " cat"]
    emoji = align_texts("😀", tokenizer_of["byte-level"], tokenizer_of["unigram"])
    assert len(emoji.ids_a) > 1
    assert emoji.last_tokens == [(len(emoji.ids_a) - 1, len(emoji.ids_b) - 1)]


class Fast:
    """What is used of a fast tokenizer of transformers, which itself is too much to install for a test."""

    is_fast = True

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, text, *, add_special_tokens=True, return_offsets_mapping=False):
        assert return_offsets_mapping
        encoding = self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return {"input_ids": encoding.ids, "offset_mapping": encoding.offsets}

    def encode(self, text, **_):  # transformers' own returns ids alone
        raise AssertionError(text)


def test_fast_tokenizers_of_transformers(tokenizer_of):
    a, b = tokenizer_of["byte-level"], tokenizer_of["wordpiece"]
    for special in (True, False):
        want = align_texts(TEXT, a, b, add_special_tokens=special)
        assert align_texts(TEXT, Fast(a), Fast(b), add_special_tokens=special) == want
        assert align_texts(TEXT, Fast(a), b, add_special_tokens=special) == want


# --- Wrong arguments --------------------------------------------------------------------------------------------------


class Slow(Fast):
    is_fast = False


@pytest.mark.parametrize(
    ("tokenizer", "fragments"),
    [
        (Slow(None), ["tokenizer_b", "offsets", "Slow", "use_fast=True"]),
        ([(0, 1)], ["tokenizer_b", "list", "align()"]),
        (None, ["tokenizer_b", "NoneType"]),
    ],
)
def test_wrong_tokenizers(tokenizer_of, tokenizer, fragments):
    with pytest.raises(TypeError) as caught:
        align_texts("text", tokenizer_of["unigram"], tokenizer)
    assert all(fragment in str(caught.value) for fragment in fragments), caught.value


@pytest.mark.parametrize(
    ("offsets", "error", "fragments"),
    [
        ([(0, 2), (2, 4), (1, 4)], ValueError, ["offsets_b", "backwards", "(1, 4)", "token 2", "starts at 2"]),
        ([(0, 4), (2, 3)], ValueError, ["offsets_b", "backwards", "(2, 3)", "token 1", "up to 4"]),
        ([(0, 2), (2, 4), (0, 2)], ValueError, ["offsets_b", "(0, 2)", "token 2", "one text"]),
        ([(0, 2), (4, 3)], ValueError, ["offsets_b[1]", "start <= end", "(4, 3)"]),
        ([(-1, 2)], ValueError, ["offsets_b[0]", "0 <= start", "(-1, 2)"]),
        ([(0, 2), 5], TypeError, ["offsets_b[1]", "pair", "5"]),
        ([(0, 2, 3)], TypeError, ["offsets_b[0]", "pair", "(0, 2, 3)"]),
        ([(0.0, 2.0)], TypeError, ["offsets_b[0]", "integers"]),
        (["ab"], TypeError, ["offsets_b[0]", "'ab'"]),
    ],
)
def test_wrong_offsets(offsets, error, fragments):
    with pytest.raises(error) as caught:
        align([(0, 2)], offsets)
    assert all(fragment in str(caught.value) for fragment in fragments), caught.value
    with pytest.raises(error, match=re.escape("offsets_a")):
        align(offsets, [(0, 2)])
