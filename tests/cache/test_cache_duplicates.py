"""A second sample of one key: the same targets, other ones, and what is kept."""

from __future__ import annotations

import itertools
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from kdfast import CacheError, SparseTargets, cache, soft_targets

V = 300
IDS = torch.arange(90)


def targets(number=0, **options):
    logits = torch.randn(90, V, generator=torch.Generator().manual_seed(number)) * 3
    return soft_targets(logits, **{"k": 12, "temperatures": (1.0, 2.0)} | options)


def other_than(given):
    """One entry a little less probable."""
    logprobs = given.logprobs.clone()
    logprobs[70, -1] -= 0.5
    return SparseTargets(given.ids, logprobs, vocab_size=V, lse=given.lse)


def wider(given):
    """The same in rows of more places, as a batch with a wider sample would have made it, and in another order."""
    order = torch.randperm(given.ids.shape[-1])
    more = (0, 5)
    return SparseTargets(
        torch.nn.functional.pad(given.ids[:, order], more, value=-1),
        torch.nn.functional.pad(given.logprobs[:, order], more, value=-torch.inf),
        vocab_size=V,
        lse=given.lse,
        k_eff=torch.full((90,), given.ids.shape[-1], dtype=torch.int32),
    )


def refused(writer, given, key="a"):
    with pytest.raises(CacheError, match=r"same token ids and other targets.*on_duplicate") as raised:
        writer.write(key, given, IDS)
    assert (raised.value.code, raised.value.key) == ("duplicate", key)


@pytest.mark.parametrize("tier", ["fixed", "compact"])
@pytest.mark.parametrize("where", ["queued", "committed", "another writer's"])
def test_the_same_targets_are_left_and_others_refused(where, tier, tmp_path):
    first = cache.Writer(tmp_path, vocab_size=V, tier=tier)
    assert first.write("a", targets(), IDS)
    first.write("b", targets(1), IDS)
    writer = first
    if where == "committed":
        first.commit()
    if where == "another writer's":
        first.close()
        writer = cache.Writer(tmp_path, vocab_size=V, tier=tier)
    for _ in range(2):
        assert not writer.write("a", targets(), IDS)
        assert not writer.write("a", wider(targets()), IDS)
        refused(writer, other_than(targets()))
        refused(writer, targets(1))
        refused(writer, targets(k=11))
    assert writer.write("c", targets(2), IDS)  # nothing else is lost
    writer.close()
    reader = cache.Reader(tmp_path)
    assert sorted(reader) == ["a", "b", "c"]
    assert torch.equal(reader["a"].ids, targets().ids)
    assert cache.verify(tmp_path)[0] == 3


def test_tiers_hold_the_same_numbers_and_grids_others(tmp_path):
    with cache.Writer(tmp_path, vocab_size=V, tier="compact") as writer:
        writer.write("a", targets(), IDS)
    with cache.Writer(tmp_path, vocab_size=V, grid=7) as writer:
        assert not writer.write("a", targets(), IDS)  # as they would be on the grid of those that are there
        refused(writer, other_than(targets()))


@pytest.mark.parametrize("method", ["sample", "pps", "topp"])
def test_other_methods(method, tmp_path):
    def drawn(seed):
        options = {"p": 0.9, "k": 40} if method == "topp" else {"k": 12, "seed": seed}
        return targets(temperatures=(1.0,), method=method, **options)  # of the same logits

    with cache.Writer(tmp_path, vocab_size=V) as writer:
        writer.write("a", drawn(0), IDS)
        assert not writer.write("a", drawn(0), IDS)
        refused(writer, targets(1, temperatures=(1.0,)) if method == "topp" else drawn(1))
    with cache.Writer(tmp_path, vocab_size=V) as writer:
        assert not writer.write("a", drawn(0), IDS)
        refused(writer, targets(1, temperatures=(1.0,)) if method == "topp" else drawn(1))


def test_keep(tmp_path):
    for _ in range(2):
        with cache.Writer(tmp_path, vocab_size=V, on_duplicate="keep") as writer:
            writer.write("a", targets(), IDS)
            assert not writer.write("a", targets(1), IDS)
            with pytest.raises(CacheError, match="other token ids"):
                writer.write("a", targets(), IDS + 1)
    assert torch.equal(cache.Reader(tmp_path)["a"].ids, targets().ids)
    with pytest.raises(ValueError, match='on_duplicate must be "error" or "keep"'):
        cache.Writer(tmp_path, vocab_size=V, on_duplicate="last")


def test_a_damaged_one_is_not_compared(tmp_path):
    with cache.Writer(tmp_path, vocab_size=V) as writer:
        writer.write("a", targets(), IDS)
    (shard,) = tmp_path.glob("*.shard")
    data = bytearray(shard.read_bytes())
    data[1000] ^= 1
    shard.write_bytes(data)
    with cache.Writer(tmp_path, vocab_size=V) as writer:
        with pytest.raises(CacheError) as raised:
            writer.write("a", targets(), IDS)
        assert (raised.value.code, raised.value.key) == ("checksum", "a")
        assert writer.write("b", targets(), IDS)


def test_merge(tmp_path):
    def filled(name, seed, **options):
        with cache.Writer(tmp_path / name, vocab_size=V, **options) as writer:
            writer.write("a", targets(seed), IDS)
            writer.write(name, targets(seed), IDS)
        return tmp_path / name

    first, same, other = filled("first", 0), filled("same", 0, tier="compact"), filled("other", 1)
    assert cache.merge([first, same], tmp_path / "both") == (3, 1)
    for sources, into in (([first, other], "new"), ([other], "both")):
        with pytest.raises(CacheError, match=r"other targets.*on_duplicate") as raised:
            cache.merge(sources, tmp_path / into)
        assert (raised.value.code, raised.value.key) == ("duplicate", "a")
    assert not (tmp_path / "new").exists()
    assert sorted(cache.Reader(tmp_path / "both")) == ["a", "first", "same"]
    assert cache.merge([other], tmp_path / "both", on_duplicate="keep") == (1, 1)
    reader = cache.Reader(tmp_path / "both")
    assert torch.equal(reader["a"].ids, targets(0).ids)
    assert torch.equal(reader["other"].ids, targets(1).ids)
    with pytest.raises(ValueError, match="on_duplicate must be"):
        cache.merge([other], tmp_path / "both", on_duplicate="first")


def test_an_export_comes_back_into_its_own_cache(tmp_path):
    """With entries of equal probability in another order, and other last bits."""
    pytest.importorskip("pyarrow", reason="the cache extra is not installed")
    from kdfast.cache.parquet import export_parquet, import_parquet

    coarse = torch.randint(0, 6, (90, V)).float()  # many are equal
    for tier in ("fixed", "compact"):
        with cache.Writer(tmp_path / tier, vocab_size=V, tier=tier) as writer:
            writer.write("a", targets(), IDS)
            writer.write("b", soft_targets(coarse, k=12, temperatures=(1.0, 2.0)), IDS)
            writer.write("c", targets(k=(1, 12), method="topp", p=0.9), IDS)
        export_parquet(cache.Reader(tmp_path / tier), tmp_path / "x.parquet")
        assert import_parquet(tmp_path / "x.parquet", tmp_path / tier, tier=tier)[::2] == (0, 3)
        import_parquet(tmp_path / "x.parquet", tmp_path / "again")
        assert cache.merge([tmp_path / tier], tmp_path / "again") == (0, 3)


def test_wider_rows_of_the_same_writer_cost_no_commit(tmp_path):
    with cache.Writer(tmp_path, vocab_size=V) as writer:
        for tier in range(3):
            writer.write(tier, targets(tier), IDS)
        assert not any(writer.write(i, wider(targets(i)), IDS) for i in range(3))
        assert writer.bytes_written() < 500  # a header


def test_nothing_is_taken_once_a_writer_closes(tmp_path):
    for attempt in range(20):
        taken, folder = [], tmp_path / str(attempt)
        writer = cache.Writer(folder, vocab_size=V, temperatures=(1.0, 2.0), queue_bytes=20_000)

        def write(start, writer=writer, taken=taken):
            for i in itertools.count(start, 3):
                if writer.write(i, targets(i % 5), IDS):
                    taken.append(str(i))

        with ThreadPoolExecutor(3) as pool:
            done = [pool.submit(write, i) for i in range(3)]
            time.sleep(0.01)
            writer.close()
            for one in done:
                with pytest.raises(ValueError, match="the writer is closed"):
                    one.result()
        assert sorted(cache.Reader(folder)) == sorted(taken)


def test_threads_that_write_the_same(tmp_path):
    with cache.Writer(tmp_path, vocab_size=V) as writer, ThreadPoolExecutor(4) as pool:
        new = list(pool.map(lambda i: writer.write(f"{i % 5}", targets(i % 5), IDS), range(40)))
    assert sum(new) == 5
    assert cache.verify(tmp_path)[:1] == (5,)
