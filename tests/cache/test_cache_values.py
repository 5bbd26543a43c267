"""What the entries of a token are to each other: no id twice, no mass above 1; and how much a read may take."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys

import format_writer as w
import pytest
import torch
from format_parts import RAGGED

from kdfast import CacheError, SparseTargets, cache, soft_targets
from kdfast.cache.manifest import write_manifest

V = 70000


def stored(folder, frames):
    """A cache of one finished shard, at temperatures 1 and 2."""
    header = w.header(V, (1.0, 2.0))
    shard = w.Shard(header, 7, 1, 0, frames)
    first, last = shard.ends()[0], shard.ends()[-1]
    records = [
        w.Record("begin", shard_id=int.from_bytes(header[-4:], "little")),
        w.Record("open", 0, 7, first),
        w.Record("finish", 0, 7, last, len(frames)),
        w.Record("close", samples=len(frames)),
    ]
    folder.mkdir()
    (folder / "cache.header").write_bytes(header)
    (folder / f"{1:016x}.journal").write_bytes(w.journal(1, records))
    (folder / shard.name).write_bytes(shard.pack())
    return folder


def frame(key, tokens, kept):
    cuts = range(0, len(tokens), 256)
    blocks = [w.fixed_block(tokens[i : i + 256], 17, ragged=True) for i in cuts]
    return w.SampleFrame(key, len(tokens), kept, blocks, flags=RAGGED, block_tokens=256)


SOUND = w.Fixed(-0.7, (1, 2), (0,), (1.0,))
WRONG = {
    "id 5 twice": w.Fixed(-1.0, (5, 5), (0,), (1.0,)),
    "mass of 16": w.Fixed(-0.0, range(16), [0] * 15, (9.0,)),
    "temperature 2": w.Fixed(-0.7, (1, 2), (0,), (0.3,)),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_reader_refuses_the_block_whenever_and_however_it_is_read(what, tmp_path):
    tokens = [SOUND] * 300
    tokens[40] = WRONG[what]
    folder = stored(tmp_path / "c", [frame("good", [SOUND] * 300, 16), frame("bad", tokens, 16)])
    reader = cache.Reader(folder)
    for _ in range(2):
        assert len(reader["good"].ids) == 300
        assert len(reader["bad", 256:].ids) == 44  # of another block
        for read in (reader.read, reader.packed):
            for selector in ("bad", ("bad", slice(40, 41)), ("bad", slice(0, 256))):
                with pytest.raises(CacheError, match=what) as raised:
                    read([selector])
                assert (raised.value.code, raised.value.key) == ("corrupt", "bad")
    (fault,) = cache.verify(folder).faults
    assert (fault.code, fault.key) == ("corrupt", "bad")
    done = cache.repair(folder)
    assert (done.kept, [fault.key for fault in done.lost]) == (1, ["bad"])
    assert list(cache.Reader(folder)) == ["good"]


def targets_of(mass, at_two=0.0, tokens=5):
    """Top-k targets whose third token has this mass, and whose mass at temperature 2 is e^-at_two of the whole."""
    targets = soft_targets(0.1 * torch.randn(tokens, 50), k=50, temperatures=(1.0, 2.0))
    logprobs, lse = targets.logprobs.clone(), {t: x.clone() for t, x in targets.lse.items()}
    logprobs[2] += torch.tensor(mass, dtype=torch.float64).log()
    lse[2.0][2] = torch.logsumexp(logprobs[2].double() / 2, -1) + at_two
    return SparseTargets(targets.ids, logprobs, vocab_size=50, lse=lse)


@pytest.mark.parametrize("mass", [1.00003, 1.01, 16.0])
def test_a_writer_refuses_a_mass_above_1(mass, tmp_path):
    with cache.Writer(tmp_path, vocab_size=50) as writer:
        writer.write("a", targets_of(1.0))
        with pytest.raises(ValueError, match=r"sample b, token 2: .* mass of .* at temperature 1\.0.*, more than 1"):
            writer.write("b", targets_of(mass))
        with pytest.raises(ValueError, match=r"sample b, token 2: .* at temperature 2\.0.*, more than 1"):
            writer.write("b", targets_of(1.0, at_two=-float(torch.tensor(mass).log())))
        writer.write("b", targets_of(1.000005))
    assert sorted(cache.Reader(tmp_path)) == ["a", "b"]


def test_a_writer_refuses_more_draws_than_were_made(tmp_path):
    ids = torch.tensor([[3, 4, -1, -1]], dtype=torch.int32)
    mass = torch.tensor([[0.75, 0.5, 0, 0]])
    targets = SparseTargets(ids, None, vocab_size=9, method="sample", mass=mass, neg_entropy=torch.tensor([-1.0]))
    with cache.Writer(tmp_path, vocab_size=9) as writer, pytest.raises(ValueError, match="drawn 5 times of 4"):
        writer.write("a", targets)


@pytest.mark.parametrize("temperatures", [(1.0,), (0.05, 1.0, 2.0)])
@pytest.mark.parametrize("tier", ["fixed", "compact"])
def test_what_a_writer_takes_a_reader_gives_back(temperatures, tier, tmp_path):
    """Near the limit, where the rounding of a grid, of tops and of normalisers could carry a mass over it."""
    taken: list[float] = []
    with cache.Writer(tmp_path, vocab_size=60, temperatures=temperatures, tier=tier) as writer:
        for i in range(60):
            logits = torch.randn(20, 60, dtype=torch.float64) * 10 ** (i % 4 - 1)
            over = 1.2e-5 * torch.rand(20, 1, dtype=torch.float64)
            logprobs = (logits.log_softmax(-1) + over).clamp(max=0).float()
            lse = {t: torch.logsumexp(logprobs.double() / t, -1) - over[:, 0] for t in temperatures}
            targets = SparseTargets(
                torch.arange(60, dtype=torch.int32).repeat(20, 1),
                logprobs,
                vocab_size=60,
                lse={t: torch.zeros(20) if t == 1 else x.float() for t, x in lse.items()},
            )
            for row in range(20):
                may_be_refused = contextlib.suppress(ValueError) if over[row] > 0.9e-5 else contextlib.nullcontext()
                with may_be_refused:
                    writer.write(f"{i}/{row}", targets[row : row + 1])
                    taken.append(float(over[row]))
    assert max(taken) > 0.99e-5
    assert cache.verify(tmp_path).faults == []


def test_rows_that_hold_nothing_take_no_more_memory_than_asked_for(tmp_path):
    folder = stored(tmp_path / "c", [frame("wide", [w.Fixed(0.0, (), (), (1.0,))] * 4096, 65535)])
    assert sum(file.stat().st_size for file in folder.iterdir()) < 50_000
    reader = cache.Reader(folder)
    with pytest.raises(ValueError, match=r"would take 2147450880 bytes, of \d+ that are stored: .* read_bytes="):
        reader["wide"]
    assert reader["wide", 100:164].ids.shape == (64, 65535)
    with pytest.raises(ValueError, match="read_bytes="):
        cache.Reader(folder, read_bytes=1 << 20)["wide", 100:164]


MEMORY = """
import resource, sys
import torch
from kdfast import cache
torch.set_num_threads(1)
reader = cache.Reader(sys.argv[1])
try:
    from kdfast.cache.parquet import export_parquet
except ModuleNotFoundError:
    export_parquet = None
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if sys.argv[2] == "verify":
    assert cache.verify(sys.argv[1]).faults == []
elif sys.argv[2] == "info":
    assert cache.statistics(reader, 1).kept == 0
elif export_parquet:
    assert export_parquet(reader, sys.argv[3]).samples == 1
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize(("what", "tokens"), [("verify", 4096), ("info", 1024), ("export", 1024)])
def test_looking_after_such_rows_takes_little(what, tokens, tmp_path):
    """Memory for some of the rows at a time, where a thousand of them take 512 MiB, and twice that as fp64."""
    folder = stored(tmp_path / "c", [frame("wide", [w.Fixed(0.0, (), (), (1.0,))] * tokens, 65535)])
    command = [sys.executable, "-P", "-c", MEMORY, str(folder), what, str(tmp_path / "x.parquet")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 300 << 10  # KiB


def test_full_rows_are_read_whatever_they_take(tmp_path):
    targets = soft_targets(torch.randn(300, V), k=64)
    with cache.Writer(tmp_path, vocab_size=V) as writer:
        writer.write("a", targets)
    reader = cache.Reader(tmp_path, read_bytes=1)
    assert reader["a"].ids.shape == (300, 64)
    with pytest.raises(ValueError, match="read_bytes must be a whole number from 1 to"):
        cache.Reader(tmp_path, read_bytes=0)


def test_a_remote_shard_with_forbidden_values_is_fetched_once(tmp_path):
    """What is wrong in the copy was wrong there."""
    pytest.importorskip("fsspec", reason="the remote extra is not installed")
    tokens = [SOUND] * 300
    tokens[40] = WRONG["mass of 16"]
    folder = stored(tmp_path / "c", [frame("good", [SOUND] * 300, 16), frame("bad", tokens, 16)])
    write_manifest(str(folder))
    reader = cache.Reader(f"file://{folder}", local_cache=tmp_path / "local")
    copies = set()
    for _ in range(3):
        with pytest.raises(CacheError, match="mass of 16") as raised:
            reader["bad"]
        assert raised.value.code == "corrupt"
        copies |= {os.stat(raised.value.path).st_ino}
    assert len(copies) == 1
    assert len(reader["good"].ids) == 300
    (fault,) = cache.verify(f"file://{folder}", local_cache=tmp_path / "local").faults
    assert (fault.code, fault.key) == ("corrupt", "bad")
