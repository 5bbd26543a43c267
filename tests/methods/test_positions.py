"""Which positions count: padding's content, side and amount change nothing, nor does what a document is packed with."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from machine import ONCE
from torch import nn

pytest.importorskip("transformers", reason="the hf extra is not installed")

import transformers
from texts import LENGTHS, QKV, H, Poison, Tokens, V, gradients_of, llama, padded, texts

import kdfast
from kdfast import Distiller, cache
from kdfast.methods import (
    CC,
    DIST,
    DKD,
    KD,
    NKD,
    PKT,
    RKD,
    SP,
    TTM,
    VID,
    AdaptiveKL,
    AttentionMaps,
    CrossEntropy,
    FitNet,
    Inputs,
    LogitStandardisation,
    MiniLM,
    MiniLMv2,
    TinyBERT,
)
from kdfast.methods.positions import documents, placed, predicting

pytestmark = [*ONCE, pytest.mark.filterwarnings("ignore")]  # of transformers

#: How a batch may lie: the side, how much padding beyond the longest, and what stands in it.
LAYOUTS = {
    "longer": {"more": 4},
    "other tokens": {"fill": V - 1},
    "left": {"left": True},
    "left, longer": {"left": True, "more": 3, "fill": 5},
}

LOSSES = {
    "kd": lambda: KD(temperature=2.0, alpha=0.4),
    "kd reverse": lambda: KD(divergence="reverse_kl", alpha=1.0),
    "ce": CrossEntropy,
    "dkd": DKD,
    "nkd": NKD,
    "ttm": lambda: TTM(alpha=0.5),
    "akl": lambda: AdaptiveKL(alpha=0.5),
    "dist": lambda: DIST(alpha=0.5),
    "standardised": lambda: LogitStandardisation(alpha=0.5),
    "fitnet": lambda: FitNet("model.layers.*", "model.layers.*"),
    "vid": lambda: VID("model.layers.1", "model.layers.1"),
    "tinybert": lambda: TinyBERT(
        student_attention="model.layers.*.self_attn.{q,k}_proj",
        teacher_attention="model.layers.*.self_attn.{q,k}_proj",
        heads=2,
        causal=True,
    ),
    "maps": lambda: AttentionMaps(
        "model.layers.*.self_attn.{q,k}_proj", "model.layers.*.self_attn.{q,k}_proj", heads=2, causal=True
    ),
    "minilm": lambda: MiniLM(QKV, QKV, heads=2, causal=True),
    "minilm v2": lambda: MiniLMv2(QKV, QKV, relation_heads=4, causal=True),
    "sp": lambda: SP("model.layers.1", "model.layers.1"),
    "sp of logits": SP,
    "pkt": lambda: PKT("model.layers.1", "model.layers.1"),
    "rkd": lambda: RKD("model.layers.1", "model.layers.1"),
}
NEEDS_LABELS = {"ce", "dkd", "nkd"}


@pytest.mark.parametrize("labelled", ["labels", "no labels"])
@pytest.mark.parametrize("name", LOSSES)
def test_padding_changes_nothing(name, labelled):
    """Of a causal model, without labels or with those that a careless collator makes: all of input_ids."""
    if labelled == "no labels" and name in NEEDS_LABELS:
        return
    student, teacher, rows = llama(), llama(seed=1), texts()

    def batch(**layout):
        ids = padded(rows, **layout)
        mask = padded([torch.ones(len(row), dtype=torch.int64) for row in rows], **{**layout, "fill": 0})
        # what a left-padded batch needs of positions, transformers' generate makes
        place = (mask.cumsum(1) - 1).clamp(min=0)
        found = {"input_ids": ids, "attention_mask": mask, "position_ids": place}
        return found | ({"labels": ids.clone()} if labelled == "labels" else {})

    with Distiller(student, teacher, [LOSSES[name]()], causal=True) as d:
        d.prepare(batch())
        want = gradients_of(d, student, batch())
        assert want[0] > 0
        for layout, options in LAYOUTS.items():
            got = gradients_of(d, student, batch(**options))
            for a, b in zip((got[0], got[2]), (want[0], want[2]), strict=True):
                torch.testing.assert_close(
                    a, b, rtol=2e-5, atol=2e-8 + 1e-5 * b.abs().max().item(), msg=lambda m, at=layout: f"{at}: {m}"
                )


def test_a_first_token_is_not_predicted_from_padding():
    """By hand, from the logits of each text alone."""
    student, teacher, rows = llama(), llama(seed=1).eval(), texts()
    with torch.no_grad():
        logits = [[m(input_ids=row[None]).logits[0, :-1] for row in rows] for m in (student, teacher)]
        z, t = (torch.cat(one) for one in logits)
        want = kdfast.distill_loss(z, t, torch.cat([row[1:] for row in rows]), temperature=4.0, alpha=0.9)
    with Distiller(student, teacher, [KD()], causal=True) as d:
        for left in (False, True):
            ids = padded(rows, left=left)
            mask = padded([torch.ones(len(row), dtype=torch.int64) for row in rows], left=left)
            place = (mask.cumsum(1) - 1).clamp(min=0)
            batch = {"input_ids": ids, "attention_mask": mask, "position_ids": place, "labels": ids.clone()}
            torch.testing.assert_close(d(batch)[0], want, rtol=1e-6, atol=0)
            items = sum(LENGTHS) - len(LENGTHS)  # of which the batch's own count is the same
            torch.testing.assert_close(d(batch, num_items=2.0 * items)[0], want / 2, rtol=1e-6, atol=0)


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize(
    "loss",
    [
        lambda: KD(temperature=2.0),
        lambda: AttentionMaps("{query,key}", "{query,key}", heads=2, causal=True),
        lambda: AttentionMaps("{query,key}", "{query,key}", heads=2),
        lambda: MiniLMv2("{query,key,value}", "{query,key,value}", relation_heads=4),
        lambda: FitNet("embed", "embed", identity=True),
    ],
    ids=["kd", "causal maps", "maps", "minilm v2", "fitnet"],
)
def test_packing_changes_nothing(loss, labelled):
    student, teacher, rows = Tokens(1).double(), Tokens(2).double(), texts()
    apart = padded(rows)
    mask = padded([torch.ones(len(row), dtype=torch.int64) for row in rows])
    packed = torch.cat(rows)[None]
    place = torch.cat([torch.arange(len(row)) for row in rows])[None]
    batches = [{"input_ids": apart, "attention_mask": mask}, {"input_ids": packed, "position_ids": place}]
    images = torch.zeros(3, *place.shape, dtype=torch.int64)  # of a vision-language model, beside the text's
    batches.append({"input_ids": packed, "position_ids": torch.cat((place[None], images))})
    if labelled:
        for one in batches:
            one["labels"] = one["input_ids"].clone()
    with Distiller(student, teacher, [loss()], causal=True) as d:
        d.prepare(batches[0])
        want, *others = (gradients_of(d, student, one) for one in batches)
        for got in others:
            for a, b in zip((got[0], got[2]), (want[0], want[2]), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    "loss",
    [
        KD,
        lambda: KD(alpha=0.5),
        DIST,
        lambda: FitNet("query", "query"),
        lambda: VID("query", "query"),
        lambda: AttentionMaps("{query,key}", "{query,key}", heads=2),
        lambda: MiniLM("{query,key,value}", "{query,key,value}", heads=2),
        *(lambda kind=kind: kind("query", "query") for kind in (SP, PKT, RKD, CC)),
        SP,
    ],
)
@pytest.mark.parametrize("causal", [False, True])
def test_nan_in_padding_stays_there(loss, causal):
    student, teacher, rows = Tokens(1), Tokens(2), texts()
    found = []
    with Distiller(student, teacher, [loss()], causal=causal) as d:
        for left in (False, True):
            mask = padded([torch.ones(len(row), dtype=torch.int64) for row in rows], left=left)
            for module in (*student.modules(), *teacher.modules()):
                if isinstance(module, Poison):
                    module.padding = mask == 0
            batch = {"input_ids": padded(rows, left=left), "attention_mask": mask}
            if not found:
                d.prepare(batch)
            found.append(gradients_of(d, student, batch))
    for a, b in zip((found[0][0], found[0][2]), (found[1][0], found[1][2]), strict=True):
        assert bool(a.isfinite().all())
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-8 + 1e-5 * b.abs().max().item())


def test_a_mask_of_the_completion_decides_for_the_logits():
    student, teacher = Tokens(1), Tokens(2)
    ids = torch.randint(1, V, (3, 8))
    completion = torch.rand(3, 8) < 0.5
    with Distiller(student, teacher, [KD()], causal=True) as d:
        got, _ = d({"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_mask": completion})
    counts = (completion[:, 1:] & completion[:, :-1]).float()
    z, t = student(ids)["logits"][:, :-1], teacher(ids)["logits"][:, :-1].detach()
    torch.testing.assert_close(got, kdfast.distill_loss(z, t, temperature=4.0, weights=counts))


# --- A teacher on disk ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_a_cache_beside_padding(tmp_path, packed):
    """Read by the batch's keys, or with the samples by a collator that pads on its own side."""
    student, teacher, rows = llama(), llama(seed=1).eval(), texts()
    keys = [str(i) for i in range(len(rows))]
    with torch.no_grad(), cache.Writer(tmp_path / "c", vocab_size=V) as writer:
        for key, row in zip(keys, rows, strict=True):
            writer.write(key, kdfast.soft_targets(teacher(input_ids=row[None]).logits[0], k=8), row)
    reader = cache.Reader(tmp_path / "c")
    stored = reader.read(keys)
    with torch.no_grad():
        z = torch.cat([student(input_ids=row[None]).logits[0, :-1] for row in rows])
    want = kdfast.distill_loss(z, kdfast.SparseTargets.cat([one[:-1] for one in stored]), temperature=1.0)
    samples = [{"input_ids": row, "id": key} for key, row in zip(keys, rows, strict=True)]
    data = cache.Dataset(reader, samples, packed=packed)
    targets = cache.collate(data.__getitems__(range(len(rows))))["targets"]
    with Distiller(student, reader, [KD(temperature=1.0)], causal=True) as d:
        for layout in ({}, {"left": True}, {"left": True, "more": 3}, {"more": 2}):
            mask = padded([torch.ones(len(row), dtype=torch.int64) for row in rows], **layout)
            place = (mask.cumsum(1) - 1).clamp(min=0)
            batch = {"input_ids": padded(rows, **layout), "attention_mask": mask, "position_ids": place}
            for more in ({"id": keys}, {"targets": targets}):
                torch.testing.assert_close(d(batch | more)[0], want, rtol=2e-5, atol=1e-6)
    with Distiller(student, None, [KD(temperature=1.0)], causal=True) as d:
        torch.testing.assert_close(d(batch | {"targets": targets})[0], want, rtol=2e-5, atol=1e-6)


def test_a_model_s_own_targets_stay():
    """Those that were made of a left-padded batch have entries at padding, too."""
    student, teacher = Tokens(1), Tokens(2)
    ids, mask = torch.randint(1, V, (2, 5)), torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    with torch.no_grad():
        targets = kdfast.soft_targets(teacher(ids)["logits"], k=V)
    with Distiller(student, None, [KD(temperature=1.0)]) as d:
        got, _ = d({"input_ids": ids, "attention_mask": mask, "targets": targets})
    want = kdfast.distill_loss(student(ids)["logits"], teacher(ids)["logits"].detach(), weights=mask.float())
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_targets_that_are_in_place_stay():
    """Those that a collator has put where the tokens are are told by where they have entries."""
    mask = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]]).bool()
    ids = torch.arange(8).view(2, 4, 1).int()
    first = kdfast.SparseTargets(
        ids, torch.zeros(2, 4, 1), vocab_size=V, k_eff=torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    )
    there = kdfast.SparseTargets(ids, torch.zeros(2, 4, 1), vocab_size=V, k_eff=mask.int())
    assert placed(first, mask).ids[..., 0][mask].tolist() == [0, 1, 4, 5, 6]
    assert placed(there, mask).ids[..., 0][mask].tolist() == [2, 3, 5, 6, 7]
    assert placed(there, None) is there


@pytest.mark.filterwarnings("error::UserWarning")
def test_labels_that_want_a_shift():
    """A model would learn to copy; said once, and where nothing else is meant."""
    student, teacher = llama(1), llama(1, seed=1)
    ids = torch.randint(1, V, (2, 6))
    prompted = torch.where(torch.arange(6) < 2, -100, ids)
    for labels in (ids, prompted):
        with Distiller(student, teacher, [KD()]) as d:
            with pytest.warns(UserWarning, match="labels are input_ids themselves, .* wants causal=True") as said:
                d({"input_ids": ids, "labels": labels})
            assert said[0].filename == __file__
            d({"input_ids": ids, "labels": labels})
    with pytest.warns(UserWarning, match="labels are input_ids themselves"):
        kdfast.report(student, teacher, [{"input_ids": ids, "labels": ids}])
    shifted = {"input_ids": ids, "labels": torch.cat((ids[:, 1:], ids[:, :1] % (V - 1) + 1), 1)}
    for fine in ({"input_ids": ids, "labels": ids.roll(1, 1)}, shifted, {"input_ids": ids}):
        with Distiller(student, teacher, [KD()]) as d:
            d(fine)
    with Distiller(student, teacher, [KD()], causal=True) as d:
        d({"input_ids": ids, "labels": ids})


def test_what_has_other_axes_says_nothing():
    mask = torch.ones(2, 5, dtype=torch.bool)
    cpu = torch.device("cpu")
    assert predicting(torch.Size([2]), mask, None, causal=False, device=cpu) is None
    assert predicting(torch.Size([2, 4]), mask, None, causal=False, device=cpu) is None
    assert predicting(torch.Size([2, 5]), None, None, causal=False, device=cpu) is None
    assert documents(torch.zeros(3, 2, 5)) is None  # of images, which do not rise
    assert documents(torch.tensor([[0, 1, 2, 0, 1, 0, 0]])).tolist() == [[0, 0, 0, 1, 1, 2, 3]]


def test_a_text_that_is_classified_has_no_mask_of_its_logits():
    """A mask (B, S) where the number of classes is S and that of the sequence the batch's."""
    config = transformers.BertConfig(
        vocab_size=V, hidden_size=H, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_labels=4
    )
    student, teacher = (transformers.BertForSequenceClassification(config).eval() for _ in range(2))
    batch = {"input_ids": torch.randint(1, V, (4, 4)), "attention_mask": torch.tensor([[1, 1, 1, 0]] * 4)}
    with Distiller(student, teacher, [KD()]) as d:
        got, _ = d(batch)
    z, t = student(**batch).logits, teacher(**batch).logits
    torch.testing.assert_close(got, kdfast.distill_loss(z, t.detach(), temperature=4.0))


@pytest.mark.parametrize("kind", ["tokens", "classes", "maps"])
def test_a_token_mask_of_any_axes(kind):
    shape = {"tokens": (3, 6), "classes": (3,), "maps": (3, 4, 5)}[kind]
    z, t, y = torch.randn(*shape, 7), torch.randn(*shape, 7), torch.randint(7, shape)
    student, teacher = nn.Linear(7, 7), nn.Linear(7, 7)
    mask = torch.rand(shape) < 0.6
    mask.flatten()[0] = True
    with Distiller(student, teacher, [KD()]) as d:
        want = kdfast.distill_loss(student(z), teacher(z), y, temperature=4.0, alpha=0.9, weights=mask.float())
        for given in (mask, mask.long(), mask.float()):
            torch.testing.assert_close(d({"input": z, "labels": y, "token_mask": given})[0], want)
            torch.testing.assert_close(d.loss(student(z), teacher(z), y, token_mask=given)[0], want)
        if kind == "tokens":
            torch.testing.assert_close(d.loss(student(z), teacher(z), y, mask=mask.long())[0], want)
            inputs = Inputs(args=(z,), labels=y, mask=mask.float())
            torch.testing.assert_close(d(inputs)[0], want)
            with pytest.raises(
                ValueError, match=r"token_mask must have the logits' leading axes \(3, 6\), got \(3, 5\)"
            ):
                d({"input": z, "labels": y, "token_mask": mask[:, 1:]})
            with pytest.raises(ValueError, match=r"weights must have the student's leading axes \(3, 6\), got \(6,\)"):
                d({"input": z, "attention_mask": mask, "weights": torch.ones(6)})
    del t


def test_positions_that_are_the_same_for_all_rows():
    student, teacher = Tokens(1), Tokens(2)
    batch = {"input_ids": torch.randint(1, V, (3, 6)), "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}
    with Distiller(student, teacher, [KD()], causal=True) as d:
        want, _ = d(batch | {"position_ids": batch["position_ids"].expand(3, 6)})
        torch.testing.assert_close(d(batch)[0], want)


@pytest.mark.parametrize("sparse", [False, True])
def test_one_sequence_without_a_batch(sparse):
    student, teacher, ids = Tokens(1), Tokens(2), torch.randint(1, V, (6,))
    with torch.no_grad():
        taught = teacher(ids)["logits"]
    targets = kdfast.soft_targets(taught, k=V) if sparse else taught
    want = kdfast.distill_loss(student(ids)["logits"][:-1], taught[:-1], ids[1:], temperature=1.0, alpha=0.9)
    with Distiller(student, None if sparse else teacher, [KD(temperature=1.0)], causal=True) as d:
        got, _ = d({"input_ids": ids, "labels": ids} | ({"targets": targets} if sparse else {}))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_probabilities_of_the_next_token():
    student, teacher, ids = Tokens(1), Tokens(2), torch.randint(1, V, (3, 6))
    y = torch.rand(3, 6, V).softmax(-1)
    with Distiller(student, teacher, [KD(alpha=0.5)], causal=True) as d:
        got, _ = d({"input_ids": ids, "labels": y})
    z, t = student(ids)["logits"][:, :-1], teacher(ids)["logits"][:, :-1].detach()
    torch.testing.assert_close(got, kdfast.distill_loss(z, t, y[:, 1:], temperature=4.0, alpha=0.5))


# --- No hard label ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.3, 0.0, 1.0])
@pytest.mark.parametrize("name", ["kd", "ttm", "akl", "standardised"])
def test_unlabelled_tokens_keep_their_soft_term(name, alpha):
    makers = {"kd": KD, "ttm": TTM, "akl": AdaptiveKL, "standardised": LogitStandardisation}
    student, teacher = nn.Linear(4, 7).double(), nn.Linear(4, 7).double()
    x, y = torch.randn(12, 4, dtype=torch.float64), torch.randint(7, (12,))
    y[:3], y[3:7] = -100, -1
    labelled, marked = y >= 0, y == -1

    def run(rows, labels, **options):
        twin = copy.deepcopy(student)
        with Distiller(twin, teacher, [makers[name](alpha=alpha, weight=1.0)], **options) as d:
            loss, _, gradient = gradients_of(d, twin, (x[rows], labels))
        return loss, gradient

    got = run(slice(None), y, unlabelled=-1)
    parts = (run(labelled, y[labelled]), run(marked, None))
    for a, one, other in zip(got, *parts, strict=True):
        torch.testing.assert_close(a, (5 * one + 4 * other) / 9, rtol=1e-5, atol=1e-7)


def test_losses_of_labels_drop_what_has_none():
    student, teacher = nn.Linear(4, 7).double(), nn.Linear(4, 7).double()
    x, y = torch.randn(12, 4, dtype=torch.float64), torch.randint(7, (12,))
    dropped = y.masked_fill(torch.arange(12) < 5, -100)
    y = y.masked_fill(torch.arange(12) < 5, -1)
    losses = [CrossEntropy(), DKD(), NKD(), KD(alpha=0.5)]
    with Distiller(student, teacher, losses, unlabelled=-1) as d:
        whole, terms = d((x, y))
        _, parts = d((x[:6], y[:6]), num_items=12)
        one, _ = d((x[:6], y[:6]), num_items=12)
        two, _ = d((x[6:], y[6:]), num_items=12)
    with Distiller(student, teacher, losses) as d:
        _, want = d((x, dropped))
    for name in ("ce", "dkd", "nkd"):
        torch.testing.assert_close(terms[name], want[name])
    assert terms["kd"] != want["kd"]
    labelled = 7 / 12  # of the mean over all, as num_items has it
    together = labelled * (terms["ce"] + terms["dkd"] + terms["nkd"]) + terms["kd"]
    torch.testing.assert_close(one + two, together, rtol=1e-6, atol=1e-9)
    assert parts.keys() == terms.keys()
    assert whole.isfinite()
    with pytest.raises(TypeError, match="unlabelled must be a label, an int, or None, got float"):
        Distiller(student, teacher, losses, unlabelled=-1.0)
    with pytest.raises(ValueError, match="unlabelled must be another label than -100, which drops a token"):
        Distiller(student, teacher, losses, unlabelled=-100)


def test_items_of_class_probabilities():
    """Mixup's labels: a row of probabilities is one example."""
    student, teacher = nn.Linear(4, 7).double(), nn.Linear(4, 7).double()
    x, y = torch.randn(12, 4, dtype=torch.float64), torch.rand(12, 7, dtype=torch.float64)
    y = y / y.sum(1, keepdim=True)
    with Distiller(student, teacher, [KD(alpha=0.5)]) as d:
        whole, _ = d((x, y))
        parts = [d((x[rows], y[rows]), num_items=12)[0] for rows in (slice(4), slice(4, None))]
    torch.testing.assert_close(sum(parts), whole)
    p, q = F.log_softmax(student(x) / 4, -1), F.log_softmax(teacher(x) / 4, -1)
    soft = 16 * (q.exp() * (q - p)).sum(-1).mean()
    torch.testing.assert_close(whole, 0.5 * soft + 0.5 * F.cross_entropy(student(x), y))
