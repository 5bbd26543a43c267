"""What only a GPU can show: no synchronisation with the host, CUDA graphs, large offsets."""

from __future__ import annotations

import contextlib

import pytest
import torch
from formulas import CASES
from machine import DEVICE

import kdfast

pytestmark = pytest.mark.skipif(DEVICE != "cuda", reason="KDFAST_TEST_DEVICE=cuda is not set")


def step(s, t, y, **options):
    return kdfast.distill_loss(s, t, y, **{"temperature": 2.0, "backend": "triton"} | options)


@contextlib.contextmanager
def no_synchronisation():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(run):
    """A CUDA graph of a call, and the results that replaying it fills."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph, results


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"label_smoothing": 0.1, "z_loss": 1e-3}], ids=str)
@pytest.mark.parametrize("rows", [1, 300])
def test_no_synchronisation(name, options, rows):
    s = torch.randn(rows, 9000, requires_grad=True)
    t, y, w = torch.randn(rows, 9000), torch.randint(9000, (rows,)), torch.rand(rows)
    tau, alpha = torch.tensor(2.0, requires_grad=True), torch.tensor(0.3)
    given = {"divergence": CASES[name].argument, "weights": w, "temperature": tau, "alpha": alpha, **options}
    step(s, t, y, **given).sum().backward()  # compiles
    with no_synchronisation():
        step(s, t, y, **given).sum().backward()


@pytest.mark.parametrize("name", ["forward_kl", "jsd"])
def test_inside_a_cuda_graph(name):
    s, t, y = torch.randn(64, 9000), torch.randn(64, 9000), torch.randint(9000, (64,))
    leaf = s.clone().requires_grad_()

    def run():
        loss = step(leaf, t, y, divergence=name)
        return loss, *torch.autograd.grad(loss, leaf)

    graph, (loss, grad) = captured(run)
    for _ in range(3):
        with torch.no_grad():
            leaf.copy_(torch.randn_like(s))
        graph.replay()
        want = run()
        assert torch.equal(loss, want[0])
        assert torch.equal(grad, want[1])


def kept_of(t, k=64):
    """The k largest columns of each row as sparse targets, exact at T = 1 and 2."""
    log_q = t.float().log_softmax(-1)
    values, ids = log_q.topk(k)
    return kdfast.SparseTargets(ids.int(), values, vocab_size=t.shape[-1], lse={2.0: (log_q / 2).logsumexp(-1)})


SPARSE = [("bucket", "forward_kl"), ("bucket", "jsd"), ("renorm", "jsd"), ("zero", "forward_kl")]


@pytest.mark.parametrize(("tail", "name"), SPARSE)
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"overwrite_logits": True}], ids=str)
@pytest.mark.parametrize("rows", [1, 300])
def test_no_synchronisation_with_sparse_targets(tail, name, options, rows):
    s, targets, y = torch.randn(rows, 9000), kept_of(torch.randn(rows, 9000)), torch.randint(9000, (rows,))
    given = {"tail": tail, "divergence": name, **options}
    step(s.clone().requires_grad_(), targets, y, **given).sum().backward()  # compiles
    leaf = s.clone().requires_grad_()
    with no_synchronisation():
        step(leaf, targets, y, **given).sum().backward()


@pytest.mark.parametrize("k", [1, 64, 1000])
@pytest.mark.parametrize("rows", [2, 64])
def test_sparse_targets_inside_a_cuda_graph(rows, k):
    s, targets, y = torch.randn(rows, 9000), kept_of(torch.randn(rows, 9000), k), torch.randint(9000, (rows,))
    leaf = s.clone().requires_grad_()

    def run():
        loss = step(leaf, targets, y)
        return loss, *torch.autograd.grad(loss, leaf)

    graph, (loss, grad) = captured(run)
    for _ in range(3):
        with torch.no_grad():
            leaf.copy_(torch.randn_like(s))
            targets.ids.copy_(torch.rand(rows, 9000).topk(k).indices)  # their order is found anew in the graph
        graph.replay()
        want = run()
        assert torch.equal(loss, want[0])
        assert torch.equal(grad, want[1])


def packed_of(targets, folder):
    """The same by way of a cache, which lives on the CPU: (packed, unpacked)."""
    with torch.device("cpu"):
        with kdfast.cache.Writer(folder, vocab_size=targets.vocab_size, temperatures=(1.0, 2.0)) as writer:
            writer.write("a", targets.to("cpu"))
        reader = kdfast.cache.Reader(folder)
        return reader.packed(["a"])[0].pin_memory().to(DEVICE, non_blocking=True), reader["a"].to(DEVICE)


@pytest.mark.parametrize("k", [1, 64, 1000, 1500])
@pytest.mark.parametrize("rows", [2, 300])
def test_packed_targets_give_the_bits_of_the_unpacked_ones_without_synchronising(rows, k, tmp_path):
    s, y = torch.randn(rows, 9000), torch.randint(9000, (rows,))
    packed, plain = packed_of(kept_of(torch.randn(rows, 9000) * 3, k), tmp_path)

    def run(targets):
        leaf = s.clone().requires_grad_()
        loss = step(leaf, targets, y)
        return loss.detach(), *torch.autograd.grad(loss, leaf)

    want = run(plain)
    run(packed), packed.unpack()  # compiles
    with no_synchronisation():
        got, unpacked = run(packed), packed.unpack()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert torch.equal(unpacked.ids, plain.ids)
    assert torch.equal(unpacked.logprobs, plain.logprobs)


def test_packed_targets_inside_a_cuda_graph(tmp_path):
    s, y = torch.randn(64, 9000), torch.randint(9000, (64,))
    packed, _ = packed_of(kept_of(torch.randn(64, 9000)), tmp_path)
    leaf = s.clone().requires_grad_()

    def run():
        loss = step(leaf, packed, y)
        return loss, *torch.autograd.grad(loss, leaf)

    graph, results = captured(run)
    for _ in range(3):
        with torch.no_grad():
            leaf.copy_(torch.randn_like(s))
        packed.offset.copy_(packed.offset.roll(1))
        packed.top.copy_(packed.top.roll(1))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(results, run(), strict=True))


@pytest.mark.parametrize("k", [64, 1000, 4096])
@pytest.mark.parametrize("rows", [2, 500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_kept_columns_are_read_before_they_are_overwritten(k, rows, dtype, reduction):
    """Warps of a program run apart: none may write the gradient over a logit that another has yet to read."""
    v = 40000
    targets, y = kept_of(torch.randn(rows, v), k), torch.randint(v, (rows,))
    for _ in range(5):
        s = (2 * torch.randn(rows, v)).to(dtype)
        apart, over = s.clone().requires_grad_(), s.clone().requires_grad_()
        (want,) = torch.autograd.grad(step(apart, targets, y, reduction=reduction).sum(), apart)
        loss = step(over, targets, y, reduction=reduction, overwrite_logits=True).sum()
        (got,) = torch.autograd.grad(loss, over)
        assert got.data_ptr() == over.data_ptr()
        assert torch.equal(got, want)


def test_offsets_beyond_32_bits():
    rows, v = 17000, 128256
    s = torch.zeros(rows, v, dtype=torch.bfloat16, requires_grad=True)
    t = torch.zeros(rows, v, dtype=torch.bfloat16)
    with torch.no_grad():
        s[-1].normal_()
        t[-1].normal_()
    loss = step(s, t, None, reduction="none")
    assert not loss[:-1].any()
    loss[-1].backward()
    want = s.detach()[-1:].double().requires_grad_()
    exact = step(want, t[-1:].double(), None, reduction="sum", backend="reference")
    exact.backward()
    torch.testing.assert_close(loss[-1].double(), exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(s.grad[-1].double(), want.grad[0], rtol=1e-2, atol=1e-7)
    assert not s.grad[:-1].any()


def test_the_same_bits_again():
    s, t, y = torch.randn(3, 150000), torch.randn(3, 150000), torch.randint(150000, (3,))
    out = []
    for _ in range(5):
        leaf = s.clone().requires_grad_()
        loss = step(leaf, t, y, divergence="jsd")
        out.append((loss, *torch.autograd.grad(loss, leaf)))
    assert all(torch.equal(a, b) for other in out[1:] for a, b in zip(out[0], other, strict=True))


def test_values_are_checked_on_request(monkeypatch):
    s, t = torch.randn(4, 50), torch.randn(4, 50)
    bad = torch.tensor([0, 50, 1, 2])
    assert step(s, t, bad, reduction="none").isnan().tolist() == [False, True, False, False]
    monkeypatch.setenv("KDFAST_CHECK", "1")
    with pytest.raises(ValueError, match="labels must be in"):
        step(s, t, bad)
    targets = kept_of(t, 3)
    targets.ids[1, 2] = 50
    with pytest.raises(ValueError, match="ids must be in"):
        step(s, targets, None)
    monkeypatch.delenv("KDFAST_CHECK")
    assert step(s, targets, None, reduction="none").isnan().tolist() == [False, True, False, False]


SELECTIONS = {
    "topk": {"temperatures": (1.0, 2.0, 3.0)},
    "topp": {"p": 0.9, "k": (2, 200)},
    "sample": {"seed": 3, "temperatures": (2.0,)},
    "pps": {"seed": 3},
}


def entries(targets):
    return [x for x in (*targets._tensors().values(), *targets.lse.values()) if x is not None]


@pytest.mark.parametrize("method", SELECTIONS)
@pytest.mark.parametrize("rows", [1, 300])
def test_soft_targets_do_not_synchronise(method, rows):
    x = torch.randn(rows, 9000).bfloat16()
    x[0] = 1  # more equals than there is room for
    kdfast.soft_targets(x, method=method, **SELECTIONS[method])  # compiles
    with no_synchronisation():
        kdfast.soft_targets(x, method=method, **SELECTIONS[method])


@pytest.mark.parametrize("method", SELECTIONS)
def test_soft_targets_inside_a_cuda_graph(method):
    x = torch.randn(64, 9000)

    def run():
        return kdfast.soft_targets(x, method=method, **SELECTIONS[method])

    graph, targets = captured(run)
    for _ in range(3):
        x.normal_()
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(entries(targets), entries(run()), strict=True))


def test_soft_targets_beyond_32_bits():
    x = torch.zeros(17000, 128256, dtype=torch.bfloat16)
    x[-1].normal_()
    targets = kdfast.soft_targets(x, temperatures=(1.0, 2.0))
    want = kdfast.soft_targets(x[-1:], temperatures=(1.0, 2.0))
    assert torch.equal(targets.ids[:-1], torch.arange(64, dtype=torch.int32).expand(16999, -1))
    assert all(torch.equal(a, b) for a, b in zip(entries(targets[-1:]), entries(want), strict=True))
    exact = x[-1].double().log_softmax(-1).sort(descending=True, stable=True)
    assert torch.equal(targets.ids[-1], exact.indices[:64].int())
    torch.testing.assert_close(targets.logprobs[-1], exact.values[:64].float(), rtol=1e-6, atol=2e-6)


def test_a_cache_written_from_the_gpu_is_that_of_the_host(tmp_path):
    """Copies go on beside the device's work, and the logits' memory is used again at once."""
    ids = [torch.randint(500, (64,)) for _ in range(30)]
    kept = []
    with kdfast.cache.Writer(tmp_path / "gpu", vocab_size=500) as writer:
        for k, tokens in enumerate(ids):
            targets = kdfast.soft_targets(torch.randn(64, 500), k=16)
            kept.append(targets.to("cpu"))
            writer.write(k, targets, tokens)
            del targets
    with kdfast.cache.Writer(tmp_path / "host", vocab_size=500) as writer:
        for k, tokens in enumerate(ids):
            writer.write(k, kept[k], tokens.cpu())
    gpu, host = (kdfast.cache.Reader(tmp_path / name) for name in ("gpu", "host"))
    for k in range(30):
        for a, b in ((gpu[k].ids, host[k].ids), (gpu[k].logprobs, host[k].logprobs)):
            assert torch.equal(a, b)
