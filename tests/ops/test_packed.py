"""Packed targets: the same bits as the reader's own decoder, in every kernel that unpacks them."""

from __future__ import annotations

import io
import pickle

import pytest
import torch
from machine import DEVICE, ISAS, KERNEL, TRACES, TRITON, choose
from torch.utils.data import DataLoader

from kdfast import CacheError, LMHead, PackedTargets, SparseTargets, cache, distill_loss, soft_targets
from kdfast.ops.unpack.cpu import unpack

pytestmark = pytest.mark.skipif(not ISAS, reason="the compiled extension is not there")

TAUS = (1.0, 2.0)


def written(folder, samples, v, **options):
    """A reader of a cache of these samples; a cache lives on the CPU."""
    with torch.device("cpu"):
        with cache.Writer(folder, vocab_size=v, **{"temperatures": TAUS} | options) as writer:
            for key, targets in samples.items():
                writer.write(key, targets)
        return cache.Reader(folder)


def stepped(*shape, **options):
    """Targets of distinct ids whose differences are of all three lengths: 4 bits, a byte more, five bytes more."""
    with torch.device("cpu"):
        return _stepped(*shape, **options)


def _stepped(tokens, k, v, *, grid=4, ragged=False, gold=False, escapes=0.2, least=0):
    ids = torch.stack([distinct(k, v) for _ in range(tokens)]) if tokens else torch.zeros(0, k)
    delta = torch.randint(0, 15, (tokens, k))
    kind = torch.rand(tokens, k)
    delta = torch.where(kind < escapes, torch.randint(15, 270, (tokens, k)), delta)
    delta = torch.where(kind < escapes / 5, torch.randint(270, 1 << 15, (tokens, k)), delta)
    delta[:, 0] = 0
    below = delta.cumsum(-1) * 2.0**-grid
    first = -torch.rand(tokens, 1, dtype=torch.float64) - torch.logsumexp(-below.double(), -1, keepdim=True)
    logprobs = (first - below).float()
    k_eff = torch.randint(least, k + 1, (tokens,), dtype=torch.int32) if ragged else None
    if k_eff is not None:
        ids = torch.where(torch.arange(k) < k_eff[:, None], ids, -1)
    return SparseTargets(
        ids.int(),
        logprobs,
        vocab_size=v,
        lse={1.0: torch.zeros(tokens), 2.0: torch.logsumexp(logprobs / 2, -1) + torch.rand(tokens)},
        k_eff=k_eff,
        method="topp" if ragged else "topk",
        gold_logprob=-torch.rand(tokens) if gold else None,
    )


def distinct(k, v):
    if v <= 4096:
        return torch.randperm(v)[:k]
    found = torch.randint(v, (4 * k + 8,)).unique()
    return found[torch.randperm(len(found))[:k]]


def on_kernel(packed):
    """The targets as the tested kernel unpacks them."""
    if not TRITON:
        return packed.unpack()
    from kdfast.kernels.triton import unpack_launch

    x = packed.to(DEVICE)
    ids = torch.full(x.shape, -7, dtype=torch.int32)
    logprobs = torch.full(x.shape, float("nan"))
    unpack_launch.run(x.data, x.offset, x.top, x.k_eff, x.vocab_size, x.grid, ids, logprobs)
    return ids.cpu(), logprobs.cpu()


def assert_same(packed, want):
    got = on_kernel(packed)
    ids, logprobs = (got.ids, got.logprobs) if isinstance(got, SparseTargets) else got
    assert torch.equal(ids, want.ids)
    assert torch.equal(logprobs.view(torch.int32), want.logprobs.view(torch.int32))
    for name in ("k_eff", "gold_logprob"):
        a, b = getattr(packed, name), getattr(want, name)
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)
    with torch.device("cpu"):
        lse = packed.unpack().lse
    assert list(lse) == list(want.lse)
    assert all(torch.equal(lse[t], want.lse[t]) for t in lse)
    assert (packed.method, packed.vocab_size, packed.shape) == (want.method, want.vocab_size, want.shape)


@pytest.fixture(params=["triton"] if TRITON else ISAS)
def kernel(request, monkeypatch):
    choose(request.param, monkeypatch)


# --- Bits -------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("bits", range(1, 25))
def test_ids_of_every_width(bits, tmp_path):
    v = (1 << bits) - int(torch.randint(1 << (bits - 1), (), device="cpu")) if bits > 1 else 2
    samples = {}
    for i, (ragged, gold) in enumerate([(False, False), (True, False), (False, True), (True, True)]):
        k = int(torch.randint(1, min(v, 65) + 1, (), device="cpu"))
        samples[str(i)] = stepped(3, k, v, ragged=ragged, gold=gold)
    reader = written(tmp_path, samples, v)
    for key, packed in zip(samples, reader.packed(samples), strict=True):
        assert_same(packed, reader[key])


@pytest.mark.usefixtures("kernel")
def test_every_k(tmp_path):
    samples = {str(k): stepped(2, k, 3000, ragged=k % 2 == 1) for k in range(1, 67)}
    reader = written(tmp_path, samples, 3000)
    for packed, want in zip(reader.packed(samples), reader.read(samples), strict=True):
        assert_same(packed, want)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("grid", range(2, 11))
@pytest.mark.parametrize("escapes", [0.0, 0.05, 1.0])
def test_every_grid_and_number_of_escapes(grid, escapes, tmp_path):
    reader = written(tmp_path, {"a": stepped(5, 64, 70000, grid=grid, escapes=escapes, ragged=True)}, 70000, grid=grid)
    (packed,) = reader.packed(["a"])
    assert packed.grid == grid
    assert_same(packed, reader["a"])


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("block", [64, 128, 256])
def test_ranges_and_blocks(block, tmp_path):
    tokens = 2 * block + 9
    samples = {"a": stepped(tokens, 5, 300, ragged=True, gold=True), "none": stepped(0, 5, 300)}
    reader = written(tmp_path, samples, 300, block_tokens=block)
    ends = [(None, None), (block - 3, block + 2), (2 * block, None), (3, 4), (7, 7), (-5, None)]
    parts = [slice(*pair) for pair in ends]
    for part, packed in zip(parts, reader.packed([("a", part) for part in parts]), strict=True):
        assert_same(packed, reader["a", part])
    (all_of_it,) = reader.packed(["a"])
    assert_same(all_of_it[10:40], reader["a"][10:40])
    assert_same(reader.packed(["none"])[0], reader["none"])


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("k", [100, 1500])
def test_more_entries_than_a_program_has_at_a_time(k, tmp_path, monkeypatch):
    if TRITON:
        from kdfast.kernels.triton import unpack_launch

        monkeypatch.setattr(unpack_launch, "BLOCK", 32 if k == 100 else 1024)
    reader = written(tmp_path, {"a": stepped(4, k, 5000, escapes=0.4)}, 5000)
    assert_same(reader.packed(["a"])[0], reader["a"])


@pytest.mark.usefixtures("kernel")
def test_batches(tmp_path):
    samples = {"a": stepped(6, 9, 300), "b": stepped(2, 9, 300), "c": stepped(6, 9, 300)}
    reader = written(tmp_path, samples, 300)
    a, b, c = reader.packed(samples)
    with torch.device("cpu"):
        stacked = SparseTargets.stack([reader["a"], reader["c"]])
    assert_same(PackedTargets.stack([a, c]), stacked)
    assert_same(PackedTargets.stack([a, c])[1, 2:4], stacked[1, 2:4])
    joined = PackedTargets.cat([c[:1], b, a])
    assert joined.shape == (9, 9)
    assert_same(joined[3:], reader["a"])
    longer = PackedTargets.stack([a, b.padded(6)])
    assert longer.k_eff.tolist() == [[9] * 6, [9, 9, 0, 0, 0, 0]]
    with torch.device("cpu"):
        assert (longer.unpack().ids[1, 2:] == -1).all()


@pytest.mark.skipif(not TRITON, reason="the CPU's decoder raises for it")
def test_nothing_is_read_beyond_the_bytes(tmp_path):
    """Whatever the numbers of a token say: a GPU has no error to raise, and what it reads there is its own."""
    reader = written(tmp_path, {"a": stepped(8, 20, 300, escapes=1.0)}, 300)
    (a,) = reader.packed(["a"])
    bad = torch.tensor([-1, -(2**31), 2**31 - 1, a.data.numel() // 4, a.data.numel() // 4 - 1, 0, 1, 2], device="cpu")
    x = PackedTargets(a.data, bad.int(), a.top, kept=20, vocab_size=300, grid=4)
    ids, _ = on_kernel(x)
    assert (ids[:4] == 0).all()


# --- The loss ---------------------------------------------------------------------------------------------------------

CALLS = [
    {},
    {"temperature": 2.0, "reduction": "none"},
    {"divergence": "jsd", "label_smoothing": 0.1},
    {"divergence": {"forward_kl": 0.5, "reverse_kl": 2.0}},
    {"tail": "renorm", "divergence": "jsd", "temperature": 3.0},
    {"tail": "zero", "z_loss": 1e-2},
    {"vocab": "truncate"},
    {"overwrite_logits": True},
]


def loss_and_gradient(student, targets, y, **options):
    leaf = student.clone().requires_grad_()
    given = leaf * 1 if options.get("overwrite_logits") else leaf
    loss = distill_loss(given, targets, y, backend=KERNEL, **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]


def assert_equal(got, want):
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("options", CALLS, ids=str)
@pytest.mark.parametrize("rows", [2, 5])
def test_the_loss_is_that_of_the_unpacked_targets(options, rows, tmp_path):
    v, k = 600, 20
    reader = written(tmp_path, {"a": stepped(rows, k, v, ragged=True, escapes=0.1, least=1)}, v)
    packed, plain = reader.packed(["a"])[0].to(DEVICE), reader["a"].to(DEVICE)
    columns = 500 if options.get("vocab") == "truncate" else v
    for dtype in (torch.float32, torch.bfloat16):
        s, y = torch.randn(rows, columns).to(dtype), torch.randint(columns, (rows,))
        assert_equal(loss_and_gradient(s, packed, y, **options), loss_and_gradient(s, plain, y, **options))


def test_the_loss_of_a_padded_batch_and_of_a_head(tmp_path):
    v, k = 300, 7
    reader = written(tmp_path, {"a": stepped(4, k, v), "b": stepped(2, k, v)}, v)
    packed = [{"targets": one} for one in reader.packed(["a", "b"])]
    plain = [{"targets": one} for one in reader.read(["a", "b"])]
    with torch.device("cpu"):
        packed, plain = cache.collate(packed), cache.collate(plain)
    assert torch.equal(packed["token_mask"], plain["token_mask"])
    weights = plain["token_mask"].float().to(DEVICE)
    s, y = torch.randn(2, 4, v), torch.randint(v, (2, 4))
    got, want = (
        loss_and_gradient(s, x["targets"].to(DEVICE), y, temperature=2.0, weights=weights) for x in (packed, plain)
    )
    assert_equal(got, want)
    hidden, weight = torch.randn(2, 4, 16), torch.randn(v, 16)
    losses = [
        distill_loss(LMHead(hidden, weight), x["targets"].to(DEVICE), y, weights=weights, backend=KERNEL)
        for x in (packed, plain)
    ]
    assert torch.equal(*losses)


def test_of_many_entries_the_loss_is_that_of_the_unpacked_targets(tmp_path, monkeypatch):
    if TRITON:
        from kdfast.kernels.triton import tiles

        monkeypatch.setattr(tiles, "MOST_PACKED", 16)
    reader = written(tmp_path, {"a": stepped(3, 30, 400)}, 400)
    s, y = torch.randn(3, 400), torch.randint(400, (3,))
    both = (reader.packed(["a"])[0].to(DEVICE), reader["a"].to(DEVICE))
    assert_equal(*(loss_and_gradient(s, x, y) for x in both))


@pytest.mark.skipif(TRITON, reason="the reference and the compiled kernels, which unpack first")
@pytest.mark.parametrize("options", CALLS[:6], ids=str)
def test_the_other_backends_unpack_first(options, backend, tmp_path):
    reader = written(tmp_path, {"a": stepped(5, 20, 600, ragged=True, least=1)}, 600)
    s, y = torch.randn(5, 600), torch.randint(600, (5,))
    losses = [distill_loss(s, x, y, backend=backend, **options) for x in (reader.packed(["a"])[0], reader["a"])]
    assert torch.equal(*losses)


def test_what_the_loss_refuses(tmp_path):
    reader = written(tmp_path, {"a": stepped(3, 5, 300)}, 300)
    packed, s = reader.packed(["a"])[0].to(DEVICE), torch.randn(3, 300)
    with pytest.raises(ValueError, match="temperature 4 was not captured"):
        distill_loss(s, packed, temperature=4.0, backend=KERNEL)
    with pytest.raises(ValueError, match="leading axes"):
        distill_loss(s[:2], packed, backend=KERNEL)
    with pytest.raises(ValueError, match="teacher has 300 columns, student 200"):
        distill_loss(s[:, :200], packed, backend=KERNEL)
    with pytest.raises(ValueError, match="is defined for forward_kl"):
        distill_loss(s, packed, divergence="tvd", backend=KERNEL)
    with pytest.raises(ValueError, match="carry no gradient"):
        distill_loss(s, packed, teacher_grad=True, backend=KERNEL)


# --- From the cache to a batch ----------------------------------------------------------------------------------------

ON_THE_CPU = pytest.mark.skipif(TRITON, reason="concerns no kernel")


@ON_THE_CPU
def test_a_loader_gives_packed_batches(tmp_path):
    v = 2000
    data = [{"id": f"s{i}", "input_ids": torch.randint(v, (3 * i + 1,))} for i in range(6)]
    with cache.Writer(tmp_path, vocab_size=v, temperatures=TAUS) as writer:
        for one in data:
            targets = soft_targets(torch.randn(len(one["input_ids"]), v) * 3, k=16, temperatures=TAUS)
            writer.write(one["id"], targets, one["input_ids"])
    reader = cache.Reader(tmp_path)
    loaders = [
        DataLoader(cache.Dataset(reader, data, packed=packed), batch_size=3, num_workers=2, collate_fn=cache.collate)
        for packed in (True, False)
    ]
    for got, want in zip(*loaders, strict=True):
        assert isinstance(got["targets"], PackedTargets)
        assert torch.equal(got["input_ids"], want["input_ids"])
        there = want["token_mask"]
        assert torch.equal(got["targets"].unpack().ids, want["targets"].ids)
        assert torch.equal(got["targets"].unpack().logprobs, want["targets"].logprobs)
        assert torch.equal(got["targets"].unpack().lse[2.0][there], want["targets"].lse[2.0][there])
    data[1]["input_ids"] = data[1]["input_ids"] + 1
    with pytest.raises(CacheError, match="misaligned"):
        cache.Dataset(reader, data, packed=True)[1]


@ON_THE_CPU
def test_what_crosses_to_a_device(tmp_path):
    """Bytes of a token: 17 bits an id, 4 bits a difference, a few escapes, and 4 each of offset, top and lse."""
    x = torch.randn(200, 128256) * 2
    reader = written(tmp_path, {"a": soft_targets(x, k=64, temperatures=TAUS)}, 128256)
    (packed,) = reader.packed(["a"])
    assert 136 + 32 <= packed.data.numel() / 200 <= 136 + 32 + 8
    assert packed.nbytes == packed.data.numel() + 3 * 4 * 200
    with pytest.raises(ValueError, match="only the fixed tier"):
        written(tmp_path / "drawn", {"b": soft_targets(x[:3], k=8, method="sample", seed=1)}, 128256,
                temperatures=(1.0,)).packed(["b"])  # fmt: skip


@ON_THE_CPU
def test_pickling(tmp_path):
    reader = written(tmp_path, {"a": stepped(5, 9, 300, ragged=True)}, 300)
    (packed,) = reader.packed(["a"])
    assert_same(pickle.loads(pickle.dumps(packed)), reader["a"])
    stream = io.BytesIO()
    torch.save(packed, stream)
    stream.seek(0)
    assert_same(torch.load(stream, weights_only=False), reader["a"])


@ON_THE_CPU
def test_damage_is_found_before_anything_is_packed(tmp_path):
    written(tmp_path, {"a": stepped(70, 9, 300)}, 300)
    (shard,) = tmp_path.glob("*.shard")
    data = bytearray(shard.read_bytes())
    at = data.index(b"KDFR") + 700
    data[at] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CacheError, match="checksum") as caught:
        cache.Reader(tmp_path).packed(["a"])
    assert caught.value.code == "checksum"


def fields(**changed):
    given = {"data": torch.zeros(64, dtype=torch.uint8), "offset": torch.zeros(2, dtype=torch.int32)}
    return given | {"top": -torch.ones(2), "kept": 4, "vocab_size": 300, "grid": 4} | changed


@ON_THE_CPU
@pytest.mark.parametrize(
    ("changed", "error", "says"),
    [
        ({"data": torch.zeros(64)}, TypeError, "data must be a torch.uint8 tensor, got torch.float32"),
        ({"offset": torch.zeros(2, dtype=torch.int64)}, TypeError, "offset must be a torch.int32"),
        ({"top": None}, TypeError, "top must be a torch.float32 tensor, got NoneType"),
        ({"top": torch.zeros(3)}, ValueError, r"top must be \(2,\) as offset, got \(3,\)"),
        ({"lse": {2.0: torch.zeros(3)}}, ValueError, r"lse\[2\] must be"),
        ({"k_eff": torch.zeros(2, dtype=torch.int32, device="meta")}, ValueError, "k_eff is on meta, data on cpu"),
        ({"data": torch.zeros(63, dtype=torch.uint8)}, ValueError, "from a multiple of 4 to one"),
        ({"data": torch.zeros(65, dtype=torch.uint8)[1:]}, ValueError, "from a multiple of 4 to one"),
        ({"data": torch.zeros(64, 2, dtype=torch.uint8)[:, 0]}, ValueError, "contiguous"),
        ({"kept": 0}, ValueError, "kept must be 1 to 65535, got 0"),
        ({"grid": 11}, ValueError, "grid must be 2 to 10"),
        ({"method": "sample"}, ValueError, "drawn targets are not of the fixed tier"),
    ],
)
def test_fields_that_do_not_fit(changed, error, says):
    with pytest.raises(error, match=says):
        PackedTargets(**fields(**changed))


@ON_THE_CPU
def test_targets_that_do_not_join():
    with pytest.raises(ValueError, match="needs at least one"):
        PackedTargets.stack([])
    a = PackedTargets(**fields())
    with pytest.raises(ValueError, match=r"\(method, K, vocab_size, grid, temperatures\) must agree"):
        PackedTargets.stack([a, PackedTargets(**fields(grid=5))])
    with pytest.raises(ValueError, match="shapes must agree"):
        PackedTargets.stack([a, a[:1]])
    with pytest.raises(ValueError, match="a field is there in some"):
        PackedTargets.cat([a, PackedTargets(**fields(gold_logprob=-torch.ones(2)))])
    with pytest.raises(ValueError, match="with S <= 1"):
        a.padded(1)
    with pytest.raises(IndexError, match="at most 1 indices"):
        a[0, 0]


@ON_THE_CPU
@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"offset": torch.tensor([0, -1]).int()}, "token 1 of packed targets begins or ends beyond"),
        ({"offset": torch.tensor([16, 0]).int()}, "token 0 of packed targets begins or ends beyond"),
        ({"offset": torch.tensor([2**31 - 1, 0]).int()}, "token 0 of packed targets begins or ends beyond"),
        ({"k_eff": torch.tensor([4, 5]).int()}, "token 1 of packed targets has a k_eff of 5"),
        ({"data": torch.full((64,), 255, dtype=torch.uint8)}, "of packed targets has an id|escapes|steps"),
    ],
)
def test_bytes_that_no_reader_gave(changed, says):
    with pytest.raises(ValueError, match=says):
        PackedTargets(**fields(**changed)).unpack()


@ON_THE_CPU
def test_the_operator(tmp_path):
    (packed,) = written(tmp_path, {"a": stepped(5, 9, 300, ragged=True)}, 300).packed(["a"])
    arguments = (packed.data, packed.offset, packed.top, packed.k_eff, 9, 300, 4)
    torch.library.opcheck(torch.ops.kdfast.unpack, arguments)
    assert torch.equal(unpack(*arguments)[0], packed.unpack().ids)


@ON_THE_CPU
def test_a_compiled_call(tmp_path):
    (packed,) = written(tmp_path, {"a": stepped(5, 9, 300)}, 300).packed(["a"])
    s = torch.randn(5, 300)
    compiled = torch.compile(lambda z: distill_loss(z, packed, backend=KERNEL), fullgraph=TRACES, backend="eager")
    assert torch.equal(compiled(s), distill_loss(s, packed, backend=KERNEL))
