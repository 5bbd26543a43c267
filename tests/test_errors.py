"""What a wrong argument raises, and that its message names the argument, what arrived and the remedy."""

from __future__ import annotations

import math
import re

import pytest
import torch
from machine import ISAS

from kdfast import DistillLoss, Divergence, LMHead, SparseTargets, backends, distill_loss

S, T = torch.zeros(2, 3, 8), torch.zeros(2, 3, 8)
Y = torch.zeros(2, 3, dtype=torch.int64)
IDS, LOGPROBS = torch.zeros(2, 3, 4, dtype=torch.int32), torch.full((2, 3, 4), -2.0)
SPARSE = SparseTargets(torch.arange(4, dtype=torch.int32).expand(2, 3, 4), LOGPROBS, vocab_size=8)
kernel = pytest.mark.skipif(not ISAS, reason="the compiled extension is not there")


def call(**changes):
    return distill_loss(**{"student": S, "teacher": T, "labels": Y} | changes)


# (changed arguments, error, what its message must hold)
WRONG = {
    "student is a list": ({"student": [[1.0]]}, TypeError, ["student", "list"]),
    "student is token ids": ({"student": S.long()}, TypeError, ["student", "torch.int64", "logits"]),
    "student has no columns": (
        {"student": S[..., :0], "teacher": None},
        ValueError,
        ["student", "(2, 3, 0)", "V >= 2"],
    ),
    "student has no axis": ({"student": S.sum(), "teacher": None}, ValueError, ["student", "()"]),
    "student is none": ({"student": None}, TypeError, ["student", "NoneType"]),
    "teacher is token ids": ({"teacher": T.int()}, TypeError, ["teacher", "torch.int32"]),
    "teacher is text": ({"teacher": "gpt"}, TypeError, ["teacher[0]", "str"]),
    "teacher is a number": ({"teacher": 3.0}, TypeError, ["teacher", "float"]),
    "teacher is empty": ({"teacher": []}, TypeError, ["teacher", "non-empty"]),
    "second teacher is token ids": ({"teacher": [T, T.long()]}, TypeError, ["teacher[1]", "torch.int64"]),
    "teacher of another batch": ({"teacher": T[:1]}, ValueError, ["teacher", "(2, 3)", "(1, 3)"]),
    "second teacher of another batch": ({"teacher": [T, T[:1]]}, ValueError, ["teacher[1]", "(2, 3)", "(1, 3)"]),
    "teacher of one row": ({"teacher": T[0]}, ValueError, ["teacher", "(2, 3)", "(3,)"]),
    "teacher of another vocabulary": ({"teacher": T[..., :6]}, ValueError, ["6", "8", 'vocab="truncate"']),
    "second teacher of another vocabulary": (
        {"teacher": [T, T[..., :6]]},
        ValueError,
        ["teacher[1] has 6", "student 8"],
    ),
    "teacher elsewhere": ({"teacher": T.to("meta")}, ValueError, ["teacher", "meta", "cpu", ".to("]),
    "nothing to learn from": ({"teacher": None, "labels": None}, ValueError, ["teacher", "labels", "neither"]),
    "labels are a list": ({"labels": [[0, 0, 0]] * 2}, TypeError, ["labels", "list"]),
    "labels are int32": ({"labels": Y.int()}, TypeError, ["labels", "int64", "torch.int32", "labels.long()"]),
    "labels are floats": ({"labels": Y.float()}, TypeError, ["labels", "int64", "torch.float32"]),
    "labels are flat": ({"labels": Y.flatten()}, ValueError, ["labels", "(2, 3)", "(6,)"]),
    "labels are logits": ({"labels": S - 9}, ValueError, ["labels", ">= 0"]),
    "labels are narrow": ({"labels": S[..., :7]}, ValueError, ["labels", "(2, 3, 7)", "class indices", "(2, 3, 8)"]),
    "labels elsewhere": ({"labels": Y.to("meta")}, ValueError, ["labels", "meta", "cpu", ".to("]),
    "unknown divergence": ({"divergence": "kl"}, ValueError, ["divergence", "'kl'", "forward_kl", "hellinger"]),
    "divergence is a class": ({"divergence": torch.nn.KLDivLoss()}, TypeError, ["divergence", "KLDivLoss", "name"]),
    "divergence needs its order": ({"divergence": "alpha_div"}, ValueError, ["alpha_div", "a=0.5"]),
    "empty mixture": ({"divergence": {}}, ValueError, ["divergence", "weight", "{}"]),
    "mixture of nothing": ({"divergence": {"tvd": 0.0}}, ValueError, ["divergence", "weight", "tvd"]),
    "negative mixture": ({"divergence": {"tvd": -1.0}}, ValueError, ["divergence", "tvd", "-1.0"]),
    "mixture with nan": ({"divergence": {"tvd": math.nan}}, ValueError, ["divergence", "tvd", "nan"]),
    "unknown name in a mixture": ({"divergence": {"l2": 1.0}}, ValueError, ["divergence", "'l2'", "tvd"]),
    "mixture weight is text": ({"divergence": {"tvd": "much"}}, (TypeError, ValueError), ["tvd", "much"]),
    "temperature 0": ({"temperature": 0.0}, ValueError, ["temperature", "> 0", "0.0"]),
    "temperature below 0": ({"temperature": -1}, ValueError, ["temperature", "> 0", "-1"]),
    "temperature nan": ({"temperature": math.nan}, ValueError, ["temperature", "nan"]),
    "temperature infinite": ({"temperature": math.inf}, ValueError, ["temperature", "finite", "inf"]),
    "temperature is text": ({"temperature": "hot"}, TypeError, ["temperature", "str"]),
    "temperature is a switch": ({"temperature": True}, TypeError, ["temperature", "bool"]),
    "temperature per token": ({"temperature": torch.ones(2, 3)}, ValueError, ["temperature", "0-d", "(2, 3)"]),
    "alpha above 1": ({"alpha": 1.5}, ValueError, ["alpha", "1.5", "<= 1"]),
    "alpha below 0": ({"alpha": -0.5}, ValueError, ["alpha", "-0.5", ">= 0"]),
    "alpha nan": ({"alpha": math.nan}, ValueError, ["alpha", "nan"]),
    "alpha is text": ({"alpha": "half"}, TypeError, ["alpha", "str"]),
    "alpha of another shape": ({"alpha": torch.ones(6)}, ValueError, ["alpha", "(2, 3)", "(6,)"]),
    "alpha without labels": ({"alpha": 0.5, "labels": None}, ValueError, ["alpha", "labels", "0.5"]),
    "alpha without a teacher": ({"alpha": 0.5, "teacher": None}, ValueError, ["alpha", "teacher", "0.5"]),
    "tensor alpha without labels": ({"alpha": torch.tensor(1.0), "labels": None}, ValueError, ["alpha", "labels"]),
    "token alpha without labels": ({"alpha": torch.ones(2, 3), "labels": None}, ValueError, ["alpha", "labels"]),
    "token alpha without a teacher": ({"alpha": torch.ones(2, 3), "teacher": None}, ValueError, ["alpha", "teacher"]),
    "smoothing above 1": ({"label_smoothing": 1.1}, ValueError, ["label_smoothing", "1.1"]),
    "smoothing below 0": ({"label_smoothing": -0.1}, ValueError, ["label_smoothing", "-0.1"]),
    "smoothing is a tensor": ({"label_smoothing": torch.tensor(0.1)}, TypeError, ["label_smoothing", "tensor"]),
    "z-loss below 0": ({"z_loss": -1.0}, ValueError, ["z_loss", "-1.0"]),
    "z-loss per token": ({"z_loss": torch.ones(2, 3)}, ValueError, ["z_loss", "(2, 3)"]),
    "weights are a list": ({"weights": [1.0]}, TypeError, ["weights", "list"]),
    "weights of another shape": ({"weights": torch.ones(3)}, ValueError, ["weights", "(2, 3)", "(3,)"]),
    "weights per column": ({"weights": torch.ones(2, 3, 8)}, ValueError, ["weights", "(2, 3)", "(2, 3, 8)"]),
    "weights elsewhere": ({"weights": torch.ones(2, 3, device="meta")}, ValueError, ["weights", "meta", "cpu"]),
    "batchmean": ({"reduction": "batchmean"}, ValueError, ["reduction", "batchmean", "'mean'", "'sum'", "'none'"]),
    "reduction none": ({"reduction": None}, ValueError, ["reduction", "None", "'none'"]),
    "num_items with sum": ({"num_items": 5, "reduction": "sum"}, ValueError, ["num_items", "mean", "'sum'"]),
    "num_items 0": ({"num_items": 0}, ValueError, ["num_items", "> 0"]),
    "num_items per token": ({"num_items": torch.ones(2)}, ValueError, ["num_items", "(2,)"]),
    "teacher weights of one teacher too many": (
        {"teacher": [T, T], "teacher_weights": [1.0, 1, 1]},
        ValueError,
        ["teacher_weights", "(2,)", "(3,)"],
    ),
    "teacher weights of another shape": (
        {"teacher": [T, T], "teacher_weights": torch.ones(2, 3)},
        ValueError,
        ["teacher_weights", "(2, 2, 3)", "(2, 3)"],
    ),
    "negative teacher weights": (
        {"teacher": [T, T], "teacher_weights": [1.0, -1.0]},
        ValueError,
        ["teacher_weights", ">= 0"],
    ),
    "teacher weights of 0": (
        {"teacher": [T, T], "teacher_weights": [0.0, 0.0]},
        ValueError,
        ["teacher_weights", "sum"],
    ),
    "teacher weights without a teacher": ({"teacher": None, "teacher_weights": [1.0]}, ValueError, ["teacher_weights"]),
    "unknown ensemble": ({"ensemble": "mean"}, ValueError, ["ensemble", "'mean'", "'prob'", "'logit'"]),
    "unknown vocab": ({"vocab": "pad"}, ValueError, ["vocab", "'pad'", "'strict'", "'truncate'"]),
    "unknown tail": ({"tail": "drop"}, ValueError, ["tail", "'drop'", "'bucket'", "'renorm'", "'zero'"]),
    "memory budget of 0": ({"memory_budget": 0}, ValueError, ["memory_budget", "positive", "0"]),
    "memory budget as text": ({"memory_budget": "1GB"}, (TypeError, ValueError), ["memory_budget", "1GB"]),
    "overwriting a head": (
        {"student": LMHead(torch.zeros(2, 3, 4), torch.zeros(8, 4)), "overwrite_logits": True},
        ValueError,
        ["overwrite_logits", "LMHead"],
    ),
    "unknown backend": ({"backend": "tpu"}, ValueError, ["backend", "'tpu'", "'cpu'", "'reference'"]),
    "gradients to sparse targets": ({"teacher": SPARSE, "teacher_grad": True}, ValueError, ["teacher_grad", "sparse"]),
    "sparse targets of another batch": ({"teacher": SPARSE[0]}, ValueError, ["teacher", "(2, 3)", "(3,)"]),
    "sparse targets of another vocabulary": (
        {"student": S[..., :7], "teacher": SPARSE},
        ValueError,
        ["teacher has 8 columns, student 7", 'vocab="truncate"'],
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_argument(name):
    changes, error, fragments = WRONG[name]
    with pytest.raises(error) as caught:
        call(**changes)
    message = str(caught.value)
    assert all(fragment in message for fragment in fragments), message


def test_the_vocabulary_error_word_for_word():
    s, t = torch.empty(1, 151936, device="meta"), torch.empty(1, 152064, device="meta")
    want = 'teacher has 152064 columns, student 151936: pass vocab="truncate" to distil over the first 151936'
    with pytest.raises(ValueError, match=f"^{re.escape(want)}$"):
        distill_loss(s, t)


def test_keyword_only_and_unknown_arguments():
    with pytest.raises(TypeError):
        distill_loss(S, T, Y, "forward_kl")
    with pytest.raises(TypeError, match="tau"):
        call(tau=2.0)


# --- Values, on the CPU -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [8, -1, 2**40, -(2**40)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_labels_out_of_range(backend, label, reduction):
    y = Y.clone()
    y[1, 2] = label
    for student in (S, S.clone().requires_grad_()):
        for teacher in (T, None):
            with pytest.raises(ValueError, match=rf"labels.*\[0, 8\).*ignore_index.*{label}"):
                distill_loss(student, teacher, y, reduction=reduction, backend=backend)
    y[1, 2] = label
    assert distill_loss(S, T, y, ignore_index=label, backend=backend).isfinite()


def test_ignored_by_the_wrong_index(backend):
    with pytest.raises(ValueError, match=r"labels.*-100"):
        distill_loss(S, T, torch.full((2, 3), -100), ignore_index=0, backend=backend)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
@pytest.mark.parametrize("grad", [False, True])
def test_temperature_tensor(backend, value, grad):
    tau = torch.tensor(value, requires_grad=grad)
    with pytest.raises(ValueError, match="temperature must be > 0"):
        distill_loss(S.clone().requires_grad_(), T, temperature=tau, backend=backend)


# --- Divergences ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (("jsd", {"beta": 0.0}), ["beta", "0.0", "forward_kl"]),
        (("jsd", {"beta": 1.0}), ["beta", "1.0", "reverse_kl"]),
        (("jsd", {"beta": 1.5}), ["beta", "1.5", "between 0 and 1"]),
        (("jsd", {"beta": math.nan}), ["beta", "nan"]),
        (("jsd", {"beta": "half"}), ["beta", "half"]),
        (("jsd", {"lam": 0.5}), ["jsd", "lam=0.5", "beta"]),
        (("forward_kl", {"beta": 0.5}), ["forward_kl", "beta=0.5", "no parameter"]),
        (("forward_kl", {"normalize": True}), ["forward_kl", "normalize", "jsd"]),
        (("skew_forward_kl", {"lam": 0.0}), ["lam", "forward_kl"]),
        (("skew_reverse_kl", {"lam": 1.0}), ["lam", "1.0"]),
        (("alpha_div", {}), ["alpha_div", "a=0.5"]),
        (("alpha_div", {"a": 0.0}), ["a must", "reverse_kl"]),
        (("alpha_div", {"a": 1.0}), ["a must", "forward_kl"]),
        (("mse", {}), ["'mse'", "forward_kl", "tvd"]),
    ],
)
def test_wrong_divergence(arguments, fragments):
    name, parameters = arguments
    with pytest.raises(ValueError, match="divergence") as caught:
        Divergence(name, **parameters)
    assert all(fragment in str(caught.value) for fragment in fragments), caught.value


# --- Backends and the environment -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_backends_that_are_not_there(name):
    if any(row.name == name and row.available for row in backends().rows):
        pytest.skip(f"{name} is available on this machine")
    with pytest.raises(RuntimeError, match=name):
        call(backend=name)


def test_a_named_backend_that_cannot_serve_raises():
    head = LMHead(torch.zeros(2, 3, 4), torch.zeros(8, 4))
    for changes in ({"student": S.double()}, {"teacher": head, "teacher_grad": True}):
        with pytest.raises(RuntimeError, match="'cpu'"):
            call(backend="cpu", **changes)
    with pytest.raises(RuntimeError, match=r"'cpu'.*meta"):
        distill_loss(S.to("meta"), T.to("meta"), backend="cpu")


def test_backend_of_the_environment(monkeypatch):
    monkeypatch.setenv("KDFAST_BACKEND", "reference")
    assert backends().chosen == "reference"
    assert call().isfinite()
    monkeypatch.setenv("KDFAST_BACKEND", "tpu")
    with pytest.raises(ValueError, match=r"KDFAST_BACKEND.*'tpu'"):
        call()
    assert call(backend="reference").isfinite()  # the argument wins
    monkeypatch.setenv("KDFAST_BACKEND", "")
    assert call().isfinite()


@kernel
def test_wrong_instruction_set(monkeypatch):
    monkeypatch.setenv("KDFAST_FORCE_ISA", "sse9")
    with pytest.raises(ValueError, match=f"KDFAST_FORCE_ISA.*{'.*'.join(ISAS)}.*sse9"):
        call(backend="cpu")


# --- Heads and sparse targets -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        ((torch.zeros(2, 4), torch.zeros(8, 5)), ["hidden", "weight", "(2, 4)", "(8, 5)"]),
        ((torch.zeros(2, 4), torch.zeros(8)), ["weight", "(8,)"]),
        ((torch.zeros(2, 4), torch.zeros(8, 4), torch.zeros(7)), ["bias", "(8,)", "(7,)"]),
        ((torch.zeros(2, 4), torch.zeros(8, 4), None, 0.0), ["softcap", "> 0", "0.0"]),
        ((torch.zeros(2, 4), torch.zeros(8, 4), None, -30.0), ["softcap", "> 0", "-30.0"]),
    ],
)
def test_wrong_head(arguments, fragments):
    with pytest.raises(ValueError, match="LMHead") as caught:
        LMHead(*arguments)
    assert all(fragment in str(caught.value) for fragment in fragments), caught.value


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"method": "beam"}, ["method", "'beam'", "topk", "pps"]),
        ({"ids": IDS.float()}, ["ids", "int32", "torch.float32"]),
        ({"ids": IDS[..., 0], "logprobs": None}, ["logprobs"]),
        ({"logprobs": None}, ["'topk'", "logprobs"]),
        ({"logprobs": LOGPROBS[..., :3]}, ["logprobs", "(2, 3, 4)", "(2, 3, 3)"]),
        ({"method": "sample"}, ["'sample'", "mass", "neg_entropy"]),
        ({"method": "pps", "mass": torch.ones(2, 3, 4)}, ["'pps'", "neg_entropy"]),
        ({"lse": {2.0: torch.zeros(3)}}, ["lse[2]", "(2, 3)", "(3,)"]),
        ({"k_eff": torch.zeros(2)}, ["k_eff", "(2, 3)", "(2,)"]),
        ({"gold_logprob": torch.zeros(2, 3, 4)}, ["gold_logprob", "(2, 3)", "(2, 3, 4)"]),
    ],
)
def test_wrong_sparse_targets(changes, fragments):
    with pytest.raises(ValueError, match="SparseTargets") as caught:
        SparseTargets(**{"ids": IDS, "logprobs": LOGPROBS, "vocab_size": 8} | changes)
    assert all(fragment in str(caught.value) for fragment in fragments), caught.value


def test_a_temperature_that_was_not_captured():
    targets = SparseTargets(SPARSE.ids, LOGPROBS, vocab_size=8, lse={2.0: torch.zeros(2, 3), 4.0: torch.zeros(2, 3)})
    with pytest.raises(ValueError, match=r"temperature 3 .*1, 2, 4.*renorm"):
        call(teacher=targets, temperature=3.0)
    with pytest.raises(ValueError, match=r"temperature.*renorm"):
        call(teacher=targets, temperature=torch.tensor(2.0, requires_grad=True))


@pytest.mark.parametrize(
    ("tail", "divergence"), [("bucket", "tvd"), ("zero", "reverse_kl"), ("renorm", "reverse_kl"), ("zero", "jsd")]
)
def test_divergences_that_sparse_targets_do_not_serve(tail, divergence):
    with pytest.raises(ValueError, match=f"divergence.*{tail}.*{divergence}"):
        call(teacher=SPARSE, tail=tail, divergence=divergence)


def test_sampled_targets_serve_forward_kl_only():
    options = {"method": "sample", "mass": torch.full((2, 3, 4), 0.25), "neg_entropy": torch.zeros(2, 3)}
    targets = SparseTargets(SPARSE.ids, None, vocab_size=8, **options)
    with pytest.raises(ValueError, match=r"divergence.*'sample'.*forward_kl.*jsd"):
        call(teacher=targets, divergence="jsd")
    with pytest.raises(ValueError, match="temperature"):  # drawn at one temperature, and that is 1
        call(teacher=targets, temperature=2.0)


def test_duplicate_ids_in_sparse_targets():
    targets = SparseTargets(IDS, LOGPROBS, vocab_size=8)
    with pytest.raises(ValueError, match=r"ids.*duplicate|duplicate.*ids"):
        call(teacher=targets)


def test_ids_beyond_the_vocabulary():
    targets = SparseTargets(SPARSE.ids + 6, LOGPROBS, vocab_size=8)
    with pytest.raises(ValueError, match="ids"):
        call(teacher=targets)


def test_the_module_rejects_what_every_call_would():
    with pytest.raises(ValueError, match="divergence"):
        DistillLoss(divergence="kl")


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"scale": torch.tensor(2.0, requires_grad=True)}, TypeError, "scale must be a number.*hidden"),
        ({"softcap": torch.tensor(2.0)}, TypeError, "softcap must be a number"),
        ({"scale": "3"}, TypeError, "scale must be a number, got str"),
        ({"scale": math.nan}, ValueError, "scale must be finite"),
        ({"softcap": math.inf}, ValueError, "softcap must be > 0 and finite"),
        ({"weight": [[1.0]]}, TypeError, "weight must be a tensor, got list"),
    ],
)
def test_a_head_that_cannot_be_meant(options, error, match):
    with pytest.raises(error, match=match):
        LMHead(**{"hidden": torch.zeros(2, 4), "weight": torch.zeros(8, 4)} | options)


def test_targets_on_two_devices_or_of_whole_numbers():
    with pytest.raises(ValueError, match=r"logprobs is on meta, ids on cpu: .*\.to\(device\)"):
        SparseTargets(IDS, LOGPROBS.to("meta"), vocab_size=8)
    with pytest.raises(ValueError, match=r"lse\[2\] must be floating point"):
        SparseTargets(IDS, LOGPROBS, vocab_size=8, lse={2.0: torch.zeros(2, 3, dtype=torch.int64)})


def test_a_backend_of_the_environment_that_serves_nothing(monkeypatch):
    monkeypatch.setenv("KDFAST_BACKEND", "tpu")
    assert "KDFAST_BACKEND='tpu' names none of" in str(backends())
    with pytest.raises(RuntimeError, match="names none of"):
        _ = backends().chosen
    monkeypatch.setenv("KDFAST_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match=r"'cuda' cannot serve this call: no CUDA kernels"):
        _ = backends().chosen


@kernel
def test_targets_of_another_precision_are_read_as_fp32():
    student = torch.randn(2, 3, 8)
    exact = distill_loss(student, SPARSE, backend="cpu")
    for dtype in (torch.float64, torch.bfloat16):
        targets = SparseTargets(SPARSE.ids, LOGPROBS.to(dtype), vocab_size=8)  # -2 in any of them
        assert torch.equal(distill_loss(student, targets, backend="cpu"), exact)
