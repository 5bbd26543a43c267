"""Reading into what an earlier call gave back."""

from __future__ import annotations

import pickle
import random

import pytest
import torch
from conftest import SEED

from kdfast import SparseTargets, cache, soft_targets

V, K, TOKENS = 600, 20, 300
FIELDS = ("ids", "logprobs", "mass", "k_eff", "neg_entropy", "gold_logprob")


def targets(kind):
    logits = torch.randn(TOKENS, V) * 3
    if kind in ("sample", "pps"):
        return soft_targets(logits, k=K, method=kind)
    made = soft_targets(logits, k=K, method="topp", p=0.8) if kind == "ragged" else soft_targets(logits, k=K)
    gold = -torch.rand(TOKENS) if kind == "gold" else None
    return SparseTargets(
        made.ids, made.logprobs, vocab_size=V, lse=made.lse, k_eff=made.k_eff, method=made.method, gold_logprob=gold
    )


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    folder = tmp_path_factory.mktemp("out") / "c"
    torch.manual_seed(SEED)
    for tier in ("fixed", "compact"):
        with cache.Writer(folder, vocab_size=V, tier=tier, temperatures=[1.0]) as writer:
            for kind in ("plain", "ragged", "gold", "sample", "pps"):
                for i in range(3):
                    writer.write(f"{kind} {i} {tier}", targets(kind))
    return cache.Reader(folder)


def same(a, b):
    def equal(x, y):
        return (x is None) == (y is None) and (x is None or torch.equal(x, y))

    return all(equal(getattr(a, name), getattr(b, name)) for name in FIELDS) and all(
        torch.equal(a.lse[t].nan_to_num(7), b.lse[t].nan_to_num(7)) for t in a.lse
    )


def selections(rng, kinds, n):
    """(key, slice) of ranges whose numbers of tokens depend on n alone."""
    out = []
    for i in range(n):
        start, tier = rng.randrange(TOKENS - 100), rng.choice(["fixed", "compact"])
        out.append((f"{kinds[i % len(kinds)]} {rng.randrange(3)} {tier}", slice(start, start + 10 + 9 * i)))
    return out


@pytest.mark.parametrize(
    "kinds", [["plain"], ["ragged"], ["sample", "plain"], ["plain", "ragged", "gold", "sample", "pps"]]
)
@pytest.mark.parametrize("n", [1, 10])
def test_the_same_values_in_the_same_tensors(reader, kinds, n):
    rng = random.Random(SEED)
    out = reader.read(selections(rng, kinds, n))
    held = [one.ids.data_ptr() for one in out]
    for _ in range(5):
        asked = selections(rng, kinds, n)
        assert reader.read(asked, out=out) is out
        assert [one.ids.data_ptr() for one in out] == held
        for got, expected in zip(out, reader.read(asked), strict=True):
            assert same(got, expected)


def test_what_does_not_fit(reader):
    one, other = "plain 0 fixed", "plain 1 compact"
    out = reader.read([one, other])
    kept = out[1].ids.clone()
    for asked, why in (
        ([one], "out holds targets of 2 keys, there are 1"),
        ([one, (other, slice(0, 5))], r"key 1, 'plain 1 compact': it holds 300 x 20 of topk, the targets are 5 x 20"),
        (["gold 0 fixed", other], "the targets are 300 x 20 of topk, gold"),
        (["sample 0 fixed", other], "of sample"),
    ):
        with pytest.raises(ValueError, match=why):
            reader.read(asked, out=out)
    assert torch.equal(out[1].ids, kept)
    for no_batch in ([], list(out), tuple(out)):
        with pytest.raises(ValueError, match=r"what an earlier read\(\) gave back"):
            reader.read([one, other], out=no_batch)
    with pytest.raises(cache.CacheError):
        reader.read([one, "nobody"], out=out)
    assert reader.read([other, one], out=out) is out
    assert torch.equal(out[0].ids, kept)


def test_targets_that_were_taken_out_of_the_list_keep_its_memory(reader):
    out = reader.read(["plain 0 fixed"])
    out[0] = None
    reader.read(["plain 1 fixed"], out=out)  # what was replaced is filled, and nobody else's memory
    taken = reader.read(["plain 0 fixed", "plain 1 fixed"])
    taken[0].ids.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="storage was resized"):
        reader.read(["plain 0 fixed", "plain 1 fixed"], out=taken)


def test_pickled_it_is_a_list(reader):
    out = reader.read(["plain 0 fixed", "sample 0 fixed"])
    back = pickle.loads(pickle.dumps(out))
    assert type(back) is list
    assert all(same(a, b) for a, b in zip(out, back, strict=True))
