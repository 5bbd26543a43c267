"""Properties of the Triton kernels that only their interpreter can show: bytes moved, splits, layouts, bad values."""

from __future__ import annotations

import math

import pytest
import torch
from formulas import CASES
from machine import INTERPRETING

import kdfast
from kdfast import distill_loss, soft_targets

pytestmark = pytest.mark.skipif(not INTERPRETING, reason="TRITON_INTERPRET=1 is not set")


@pytest.fixture
def traffic(monkeypatch):
    """Bytes that kernels have read and written in whole tiles, as a dict; scalars of a row are not counted."""
    from triton.runtime.interpreter import InterpreterBuilder

    moved = {"read": 0, "written": 0}
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def count(kind, pointers, mask):
        if pointers.data.size >= 128:
            moved[kind] += int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8

    def counting_load(self, pointers, mask, *args, **options):
        count("read", pointers, mask)
        return load(self, pointers, mask, *args, **options)

    def counting_store(self, pointers, value, mask, *args, **options):
        count("written", pointers, mask)
        return store(self, pointers, value, mask, *args, **options)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counting_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", counting_store)
    return moved


def claims(monkeypatch):
    """What the launcher says of each launch of the dense kernel, as a list that fills."""
    from kdfast.kernels.triton import dense, dense_launch

    said, launch = [], dense_launch.launch

    def recording(kernel, grid, *args, **options):
        if kernel is dense.dense_kernel:
            said.append(dense_launch.bytes_per_column(args, options))
        launch(kernel, grid, *args, **options)

    monkeypatch.setattr(dense_launch, "launch", recording)
    return said


def kept_of(t, k=5):
    """The k largest columns of each row as sparse targets, exact at T = 1 and 2."""
    values, ids = t.float().log_softmax(-1).topk(k)
    lse = {2.0: (t.float().log_softmax(-1) / 2).logsumexp(-1)}
    return kdfast.SparseTargets(ids.int(), values, vocab_size=t.shape[-1], lse=lse)


@pytest.mark.parametrize("rows", [6, 2], ids=["whole rows", "split rows"])
@pytest.mark.parametrize(
    ("name", "options", "read", "written"),
    [
        ("forward_kl", {}, 8, 2),
        ("reverse_kl", {}, 8, 2),
        ("jsd", {}, 12, 2),
        ("mixture", {}, 16, 2),  # the total variation's sides take one more pass
        ("forward_kl", {"dtype": torch.float32}, 16, 4),
        ("forward_kl", {"reduction": "none"}, 12, 2),
        ("jsd", {"reduction": "none"}, 12, 2),
        ("jsd", {"inference": True}, 8, 0),
        ("hard", {}, 4, 2),
        ("sparse", {}, 4, 2),
        ("sparse", {"divergence": "jsd", "tail": "renorm"}, 4, 2),
        ("sparse", {"reduction": "none"}, 4, 2),
        ("sparse", {"inference": True}, 2, 0),
    ],
)
def test_bytes_per_column(traffic, monkeypatch, name, options, read, written, rows):
    """What the kernels' docstring says: each pass reads student and teacher once, the gradient is written once."""
    v, options = 1100, dict(options)
    dtype = options.pop("dtype", torch.bfloat16)
    inference = options.pop("inference", False)
    s, t, y = torch.randn(rows, v).to(dtype), torch.randn(rows, v).to(dtype), torch.randint(v, (rows,))
    teacher = None if name == "hard" else kept_of(t) if name == "sparse" else t
    if name not in ("hard", "sparse"):
        options["divergence"] = CASES[name].argument
    s.requires_grad_(not inference)
    claimed = claims(monkeypatch)
    loss = distill_loss(s, teacher, y, backend="triton", temperature=2.0, **options)
    if not inference:
        loss.backward(torch.ones_like(loss))
    assert (traffic["read"] / (rows * v), traffic["written"] / (rows * v)) == (read, written)
    assert sum(claimed) == read + written


def test_soft_targets_read_the_logits_once(traffic, monkeypatch):
    """And then a part of them: the chunks whose maximum reaches the floor."""
    from kdfast.kernels.triton import dense_launch, select_launch

    rows, v, k = 3, 5000, 5
    read, said, launch = {}, [], dense_launch.launch

    def recording(kernel, grid, *args, **options):
        before = traffic["read"]
        launch(kernel, grid, *args, **options)
        read[kernel.__name__] = traffic["read"] - before
        if kernel.__name__ == "scan_kernel":
            said.append(select_launch.bytes_per_column(args, options))

    monkeypatch.setattr(dense_launch, "launch", recording)
    soft_targets(torch.randn(rows, v).bfloat16(), k=k, temperatures=(1.0, 2.0, 3.0))
    assert read["scan_kernel"] == 2 * rows * v == said[0] * rows * v
    assert k * 64 * 2 * rows <= read["gather_kernel"] <= 2 * k * 64 * 2 * rows
    assert list(read) == ["scan_kernel", "floor_kernel", "gather_kernel", "keep_kernel"]


def test_which_exponential_serves_which_temperature():
    from kdfast.kernels.triton.select_launch import plan

    for temperatures, drawn, exponentials in [
        ((1.0,), False, 1),
        ((2.0, 1.0), False, 1),
        ((1.0, 2.0, 0.5, 4.0), False, 2),
        ((1.0, 3.0, 5.0), False, 3),
        ((0.5,), False, 1),
        ((0.5,), True, 2),
        ((2.0,), True, 1),
        ((1.0,), True, 1),
    ]:
        p = plan(temperatures, drawn=drawn)
        assert len(p.scales) == exponentials
        for t, e, factor in zip((*temperatures, 1.0), p.exponential, p.factor, strict=True):
            assert p.scales[e] * factor == pytest.approx(math.log2(math.e) / t)
        assert sorted(set(p.slot_of)) == list(range(p.slots))
        if drawn:
            assert (p.slot_of[0], p.exponential[0], p.factor[0]) == (0, 0, 1)


@pytest.mark.parametrize("columns", [1, 1000, 50257, 128256, 262144, 1 << 24])
@pytest.mark.parametrize("k", [1, 64, 1024, 2048])
def test_chunks_fit_in_registers(columns, k):
    from kdfast.kernels.triton import select_launch

    width = select_launch.chunk_width(columns, min(k, columns))
    assert -(-columns // width) <= select_launch.MOST_CHUNKS
    assert width & (width - 1) == 0
    if columns >= 50257:
        assert -(-columns // width) >= 1.5 * k


def test_a_factor_of_one_moves_nothing(traffic):
    s, t = torch.randn(6, 1100, requires_grad=True), torch.randn(6, 1100)
    loss = distill_loss(s, t, backend="triton")
    before = dict(traffic)
    loss.backward(retain_graph=True)
    assert traffic == before
    s.grad = None
    (2 * distill_loss(s, t, backend="triton")).backward()
    assert traffic["written"] == before["written"] * 3  # the gradient twice more, once of them scaled


@pytest.mark.parametrize("name", CASES)
def test_split_rows_agree_with_whole_ones(monkeypatch, name):
    from kdfast.kernels.triton import tiles

    s, t, y = torch.randn(3, 2900), torch.randn(3, 2900), torch.tensor([5, -100, 2899])
    out = []
    for processors in (1, 2, 100):
        monkeypatch.setattr(tiles, "processors", lambda _, n=processors: n)
        z = s.clone().requires_grad_()
        options = {"temperature": 1.7, "label_smoothing": 0.1, "z_loss": 1e-3, "backend": "triton"}
        loss = distill_loss(z, t, y, divergence=CASES[name].argument, **options)
        loss.backward()
        out.append((loss.detach(), z.grad))
    for loss, grad in out[1:]:
        torch.testing.assert_close(loss, out[0][0], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(grad, out[0][1], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("tail", ["bucket", "renorm", "zero"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_split_rows_of_kept_columns_agree_with_whole_ones(monkeypatch, tail, overwrite):
    """Kept columns in every split, on the borders of tiles, and many in one."""
    from kdfast.kernels.triton import tiles

    s, t, y = torch.randn(3, 2900), torch.randn(3, 2900), torch.tensor([511, -100, 2899])
    t[:, [0, 511, 512, 1023, 1024, 2899, *range(1200, 1300)]] += 4
    targets = kept_of(t, 110)
    out = []
    for processors in (1, 2, 100):
        monkeypatch.setattr(tiles, "processors", lambda _, n=processors: n)
        for reduction in ("sum", "none"):
            z = s.clone().requires_grad_()
            options = {"temperature": 2.0, "label_smoothing": 0.1, "z_loss": 1e-3, "overwrite_logits": overwrite}
            loss = distill_loss(z, targets, y, tail=tail, reduction=reduction, backend="triton", **options).sum()
            out.append((loss.detach(), *torch.autograd.grad(loss, z)))
    for loss, grad in out[1:]:
        torch.testing.assert_close(loss, out[0][0], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(grad, out[0][1], rtol=1e-5, atol=1e-8)


def test_layouts_without_a_copy():
    """Views whose rows lie on two strides are read where they are."""
    from kdfast.kernels.triton.dense_launch import _rows

    x = torch.randn(2, 5, 3, 40)
    for view in (x, x[:, :-1], x[:, 1], x.transpose(0, 1)[:, :, 0], x[..., :30]):
        rows = _rows(view)
        assert rows is not None
        flat = view.reshape(-1, view.shape[-1])
        for i in range(flat.shape[0]):
            at = i // rows.inner * rows.outer_stride + i % rows.inner * rows.inner_stride
            row = torch.as_strided(view, (view.shape[-1],), (1,), view.storage_offset() + at)
            assert torch.equal(row, flat[i])
    assert _rows(x[:, ::2]) is None  # three strides
    assert _rows(x.transpose(0, 2)) is None
    assert _rows(x.transpose(-1, -2)) is None


def test_bad_values_are_nan_where_nobody_may_ask(monkeypatch):
    """On a GPU a label is not looked at by the host: its token's terms and gradient become NaN, the others' stay."""
    from kdfast.kernels.triton import dense_launch
    from kdfast.spec import problem

    monkeypatch.setattr(dense_launch, "_check_values", lambda *_, **__: None)
    monkeypatch.setattr(problem, "readable", lambda _: False)
    s, t = torch.randn(4, 700, requires_grad=True), torch.randn(4, 700)
    loss = distill_loss(s, t, torch.tensor([3, 700, -5, 699]), backend="triton", reduction="none")
    loss.sum().backward()
    assert loss.isnan().tolist() == [False, True, True, False]
    assert s.grad.isnan().all(-1).tolist() == [False, True, True, False]
    assert s.grad.isnan().any(-1).tolist() == [False, True, True, False]
    assert distill_loss(s, t, temperature=torch.tensor(-1.0), backend="triton").isnan()


@pytest.mark.parametrize("rows", [8, 3], ids=["whole rows", "split rows"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("rule", ["bucket", "renorm", "zero", "drawn"])
def test_bad_ids_are_nan_where_nobody_may_ask(monkeypatch, rule, reduction, rows):
    from kdfast.kernels.triton import dense_launch

    s, t = torch.randn(rows, 1100, requires_grad=True), torch.randn(rows, 1100)
    targets = kept_of(t)
    ids = targets.ids.clone()
    ids[1, 3], ids[2, 3] = ids[1, 1], {"bucket": 1100, "renorm": -2, "zero": -(2**31), "drawn": 2**31 - 1}[rule]
    values = {"tail": rule} if rule != "drawn" else {}
    bad = kdfast.SparseTargets(ids, targets.logprobs, vocab_size=1100)
    if rule == "drawn":
        more = {"method": "sample", "mass": targets.logprobs.exp(), "neg_entropy": torch.zeros(rows)}
        bad = kdfast.SparseTargets(ids, None, vocab_size=1100, **more)
    with pytest.raises(ValueError, match="teacher: ids"):
        distill_loss(s, bad, backend="triton", **values)
    monkeypatch.setattr(dense_launch, "_check_values", lambda *_, **__: None)
    loss = distill_loss(s, bad, backend="triton", reduction=reduction, **values)
    loss.sum().backward()
    expected = [False, True, True, *[False] * (rows - 3)]
    assert loss.isnan().tolist() == (expected if reduction == "none" else True)
    assert s.grad.isnan().all(-1).tolist() == expected
    assert s.grad.isnan().any(-1).tolist() == expected


def test_the_backend_says_that_it_interprets():
    status = {row.name: row for row in kdfast.backends().rows}["triton"]
    assert status.available
    assert "interpreter" in status.reason


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("v", [2, 301])
def test_one_kept_column_of_odd_rows(rows, v):
    s, t, y = torch.randn(rows, v), torch.randn(rows, v), torch.randint(v, (rows,))
    targets = kept_of(t, 1)
    leaf, exact = s.clone().requires_grad_(), s.double().requires_grad_()
    got = distill_loss(leaf, targets, y, temperature=2.0, backend="triton")
    want = distill_loss(exact, targets, y, temperature=2.0, backend="reference")
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    (a,), (b,) = torch.autograd.grad(got, leaf), torch.autograd.grad(want, exact)
    torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["topk", "sample", "pps"])
@pytest.mark.parametrize("v", [2, 301])
def test_one_entry_is_selected_of_odd_rows(method, v):
    x = torch.randn(3, v)
    targets = soft_targets(x, k=1, method=method, **({} if method == "topk" else {"seed": 5}))
    exact = x.double().log_softmax(-1).gather(-1, targets.ids.long())
    torch.testing.assert_close(targets.logprobs.double(), exact, rtol=1e-5, atol=1e-6)
    if method == "topk":
        assert torch.equal(targets.ids[:, 0].long(), x.argmax(-1))
