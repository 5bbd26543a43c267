"""Batches of documents end to end in one row."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from kdfast import CacheError, Distiller, PackedTargets, SparseTargets, cache, distill_loss, soft_targets
from kdfast.methods import KD

V, K = 48, 6
LENGTHS = (5, 1, 9, 3)


@pytest.fixture
def documents(tmp_path):
    """A cache, and samples of some lengths with the fields that a loop has."""
    samples = []
    with cache.Writer(tmp_path / "c", vocab_size=V) as writer:
        for i, n in enumerate(LENGTHS):
            ids = torch.randint(V, (n,))
            writer.write(f"{i}", soft_targets(2 * torch.randn(n, V), k=K), ids)
            samples.append(
                {"id": f"{i}", "input_ids": ids, "weights": torch.rand(n), "attention_mask": [1] * n, "n": n, "t": "x"}
            )
    return cache.Reader(tmp_path / "c"), samples


@pytest.mark.parametrize("packed", [False, True])
def test_one_row_of_documents(documents, packed):
    reader, samples = documents
    loader = DataLoader(
        cache.Dataset(reader, samples, packed=packed), batch_size=len(samples), collate_fn=cache.collate_flat
    )
    (batch,) = loader
    n = sum(LENGTHS)
    assert isinstance(batch["targets"], PackedTargets if packed else SparseTargets)
    assert batch["targets"].shape == (1, n, K)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["position_ids"].shape == (1, n)
    assert batch["weights"].shape == (1, n)
    assert "attention_mask" not in batch
    assert batch["n"] == list(LENGTHS)
    assert batch["t"] == ["x"] * 4
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 5, 6, 15, 18]
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert batch["max_length_q"] == batch["max_length_k"] == 9
    targets = batch["targets"].unpack() if packed else batch["targets"]
    at = 0
    for sample in samples:
        here = slice(at, at + sample["n"])
        assert torch.equal(batch["input_ids"][0, here], sample["input_ids"])
        assert batch["position_ids"][0, here].tolist() == list(range(sample["n"]))
        assert batch["labels"][0, here].tolist() == [-100, *sample["input_ids"][1:].tolist()]
        assert torch.equal(targets[0, here].ids, reader[sample["id"]].ids)
        at += sample["n"]
    assert all(-100 not in sample["input_ids"] for sample in samples)  # which the batch does not share


def test_the_loss_is_that_of_each_document(documents):
    """Of the tokens that a document predicts, whatever stands beside it."""
    reader, samples = documents
    batch = cache.collate_flat([cache.Dataset(reader, samples)[i] for i in range(len(samples))])
    student = torch.randn(1, sum(LENGTHS), V, dtype=torch.float64)
    got = distill_loss(student[:, :-1], batch["targets"][:, :-1], batch["labels"][:, 1:], reduction="sum")
    expected, at = torch.zeros((), dtype=torch.float64), 0
    for sample in samples:
        n = sample["n"]
        if n > 1:
            rows = student[0, at : at + n - 1]
            targets, labels = reader[sample["id"]][: n - 1], sample["input_ids"][1:]
            expected += distill_loss(rows, targets, labels, reduction="sum")
        at += n
    torch.testing.assert_close(got, expected)


def test_with_a_distiller(documents):
    """One row gives the loss that the documents give in a padded batch, which sees each of them by itself."""
    reader, samples = documents
    config = LlamaConfig(vocab_size=V, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    model = LlamaForCausalLM(config).eval()
    model.config.use_cache = False  # with a cache of keys and values the model does not look at position_ids
    items = [cache.Dataset(reader, [{k: s[k] for k in ("id", "input_ids")} for s in samples])[i] for i in range(4)]
    padded = cache.collate(items)
    labels = padded["input_ids"].masked_fill(~padded["token_mask"], -100)
    flat = cache.collate_flat(items)
    kept = ("input_ids", "labels", "position_ids", "targets")
    with Distiller(model, reader, [KD(temperature=1.0)], causal=True) as distiller:
        alone, _ = distiller(
            {
                "input_ids": padded["input_ids"],
                "attention_mask": padded["token_mask"].long(),
                "labels": labels,
                "targets": padded["targets"],
            }
        )
        together, _ = distiller({name: flat[name] for name in kept})
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_what_the_samples_bring(documents):
    reader, samples = documents
    for sample in samples:
        sample["position_ids"] = torch.arange(sample["n"]) + 10
        sample["labels"] = [-100] * (sample["n"] - 1) + [7]
    batch = cache.collate_flat([cache.Dataset(reader, samples)[i] for i in range(len(samples))])
    assert batch["position_ids"][0, :6].tolist() == [10, 11, 12, 13, 14, 10]
    assert batch["labels"][0, :6].tolist() == [-100, -100, -100, -100, 7, -100]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_labels_of_few_bits(documents, dtype):
    """-100 is none of a byte."""
    reader, samples = documents
    items = [cache.Dataset(reader, samples)[i] for i in range(len(samples))]
    for item in items:
        item["input_ids"] = item["input_ids"].to(dtype)
    batch = cache.collate_flat(items)
    assert batch["labels"].dtype == torch.int64
    assert (batch["labels"] == -100).sum() == len(samples)


def test_what_does_not_go_together(documents):
    reader, samples = documents
    items = [cache.Dataset(reader, samples)[i] for i in range(2)]
    for change in (
        lambda item: item.pop("input_ids"),
        lambda item: item.update(input_ids=item["input_ids"][:-1]),
        lambda item: item.update(input_ids=7),
        lambda item: item.update(input_ids=item["input_ids"].float()),
    ):
        wrong = [dict(item) for item in items]
        for item in wrong:
            change(item)
        with pytest.raises(ValueError, match="input_ids"):
            cache.collate_flat(wrong)
    for name in ("labels", "position_ids"):
        for value in ([1], 3, "x"):
            with pytest.raises(ValueError, match=f"{name} must be"):
                cache.collate_flat([{**item, name: value} for item in items])
        with pytest.raises(ValueError, match="the same fields"):
            cache.collate_flat([items[0], {**items[1], name: items[1]["input_ids"]}])
    with pytest.raises(ValueError, match="at least one sample"):
        cache.collate_flat([])
    packed = cache.Dataset(reader, samples, packed=True)
    with pytest.raises(CacheError, match="some are packed"):
        cache.collate_flat([items[0], packed[1]])
    drawn = soft_targets(torch.randn(1, V), k=K, method="sample")
    with pytest.raises(CacheError, match="do not go together") as raised:
        cache.collate_flat([items[0], {**items[1], "targets": drawn}])
    assert raised.value.code == "mismatch"
