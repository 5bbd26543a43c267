"""The same loss in other libraries: the exact relation of their value to ours, as docs/migration.md states it."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import kdfast
from kdfast import Divergence, distill_loss
from kdfast.methods import CC, KD, PKT, RKD, SP, CrossEntropy, LogitStandardisation, dist_loss, standardised_loss
from kdfast.methods.feature import AttentionTransfer
from kdfast.methods.step import Outputs, Step

FOUND = importlib.util.find_spec("torchdistill")
PEERS = Path("" if FOUND is None else FOUND.submodule_search_locations[0]).parent

pytestmark = [
    pytest.mark.skipif(
        FOUND is None, reason="PYTHONPATH=build/peers: `make test` runs these in a process of their own"
    ),
    pytest.mark.filterwarnings("ignore"),  # theirs
]

N, V = 12, 31


def module(name):
    """One module of a package whose other modules, which its ``__init__`` imports, need much that is not here."""
    *parents, _ = name.split(".")
    for i in range(len(parents)):
        parent = ".".join(parents[: i + 1])
        if parent not in sys.modules:
            made = types.ModuleType(parent)
            made.__path__ = [str(PEERS.joinpath(*parents[: i + 1]))]
            sys.modules[parent] = made
    return importlib.import_module(name)


@pytest.fixture
def logits():
    """Student, which requires grad, and teacher, (N, V) fp64, and labels of which some are ignored."""
    labels = torch.randint(0, V, (N,))
    labels[::5] = -100
    student = (2 * torch.randn(N, V, dtype=torch.float64)).requires_grad_()
    return student, 3 * torch.randn(N, V, dtype=torch.float64), labels


def entropy(teacher, temperature=1.0):
    q = (teacher / temperature).softmax(-1)
    return -(q * q.log()).sum(-1)


def agree(theirs, ours, student, tolerance=1e-6):
    """Value and gradient; theirs may be computed in fp32."""
    torch.testing.assert_close(theirs.double(), ours.double(), rtol=tolerance, atol=tolerance)
    (gradient,) = torch.autograd.grad(theirs, student, retain_graph=True)
    (expected,) = torch.autograd.grad(ours, student, retain_graph=True)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=tolerance)


def io(student, teacher):
    """What torchdistill's losses take: the input and output of each module by its path."""
    return {"m": {"output": student}}, {"m": {"output": teacher}}


TD = {
    "student_module_path": "m",
    "student_module_io": "output",
    "teacher_module_path": "m",
    "teacher_module_io": "output",
}


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_torchdistill_kd(logits, temperature):
    student, teacher, labels = logits
    labels = labels.clamp(min=0)
    mid_level = module("torchdistill.losses.mid_level")
    theirs = mid_level.KDLoss(**TD, temperature=temperature, alpha=0.3)(*io(student, teacher), labels)
    ours = distill_loss(student, teacher, labels, temperature=temperature, alpha=0.7)
    agree(theirs, ours, student)  # their alpha weighs the labels
    for without in ({"alpha": 0}, {"alpha": None, "beta": 1.0}):
        theirs = mid_level.KDLoss(**TD, temperature=temperature, **without)(*io(student, teacher), labels)
        ours = distill_loss(student, teacher, temperature=temperature)
        agree(theirs, ours / temperature**2, student)  # without labels their T^2 is missing


def test_torchdistill_of_logits(logits):
    student, teacher, labels = logits
    labels = labels.clamp(min=0)
    mid_level = module("torchdistill.losses.mid_level")
    theirs = mid_level.DISTLoss(**TD, beta=2.0, gamma=0.5, tau=4.0)(*io(student, teacher))
    agree(theirs, dist_loss(student, teacher, beta=2.0, gamma=0.5, temperature=4.0), student)
    theirs = mid_level.LogitStdKDLoss(**TD, temperature=2.0, alpha=0.1, beta=9.0)(*io(student, teacher), labels)
    ours = 9.0 * standardised_loss(student, teacher, temperature=2.0) + 0.1 * distill_loss(student, None, labels)
    agree(theirs, ours, student)


def test_torchdistill_relations():
    mid_level = module("torchdistill.losses.mid_level")
    student = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(9, 20, dtype=torch.float64)
    paths = {"student_output_path": "m", "teacher_output_path": "m"}
    # Rows over the sum of their absolute values, where the paper and ours have the L2 norm: no factor between the two.
    theirs = mid_level.SPKDLoss(**paths, reduction="batchmean")(*io(student, teacher))
    grams = [F.normalize(x @ x.T, p=1.0, dim=1) for x in (student, teacher)]
    agree(theirs, (grams[0] - grams[1]).square().mean(), student)
    grams = [F.normalize(x @ x.T, p=2.0, dim=1) for x in (student, teacher)]
    agree((grams[0] - grams[1]).square().mean(), SP().compare(student, teacher), student)
    theirs = mid_level.PKTLoss(**TD)(*io(student, teacher))
    agree(theirs, PKT().compare(student, teacher), student, 1e-5)
    theirs = mid_level.RKDLoss(**paths, dist_factor=25.0, angle_factor=50.0, reduction="mean")(*io(student, teacher))
    agree(theirs, RKD(distance=25.0, angle=50.0).compare(student, teacher)[0], student)
    # The norm, not its square, of rows as they come: the paper's are of length 1.
    kernel = {"type": "gaussian", "gamma": 0.4, "max_p": 2}
    linear = {"student_linear_path": "m", "teacher_linear_path": "m"}
    unit = io(F.normalize(student), F.normalize(teacher))
    theirs = mid_level.CCKDLoss(**linear, kernel_config=kernel, reduction="batchmean")(*unit)
    agree(theirs, CC().compare(student, teacher).sqrt() / 9, student)


def test_torchdistill_attention_transfer():
    mid_level = module("torchdistill.losses.mid_level")
    student = torch.randn(4, 5, 6, 6, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(4, 9, 6, 6, dtype=torch.float64)
    config = {"a": {"student": {"path": "m", "io": "output"}, "teacher": {"path": "m", "io": "output"}, "weight": 1}}
    for mode, factor in (("code", 1.0), ("paper", 2.0)):  # "paper": theirs lacks the half of equation 2
        theirs = mid_level.ATLoss(config, mode=mode)(*io(student, teacher))
        step = Step(Outputs(None, None, {"m": [student]}), (Outputs(None, None, {"m": [teacher]}),))
        agree(theirs, factor * AttentionTransfer("m", "m", mode=mode)(step), student)


def test_a_config_of_torchdistill(logits):
    """Its criterion as the page has it, and the losses that stand for it."""
    student, teacher, labels = logits
    labels = labels.clamp(min=0)
    module("torchdistill.losses.mid_level")  # which registers what a config names
    kwargs = {**TD, "temperature": 4.0, "alpha": 0.1}
    terms = {
        "kd": {"criterion": {"key": "KDLoss", "kwargs": kwargs}, "weight": 1.0},
        "std": {"criterion": {"key": "LogitStdKDLoss", "kwargs": {**kwargs, "beta": 9.0}}, "weight": 0.5},
    }
    criterion = module("torchdistill.losses.high_level").WeightedSumLoss(sub_terms=terms)
    outs = io(student, teacher)
    theirs = criterion({"student": outs[0], "teacher": outs[1]}, {}, labels)
    losses = [
        KD(temperature=4.0, alpha=0.9),
        LogitStandardisation(temperature=4.0, weight=4.5),
        CrossEntropy(weight=0.05),
    ]
    step = Step(Outputs(student), (Outputs(teacher),), labels)
    values = [found[0] if isinstance(found := loss(step), tuple) else found for loss in losses]
    agree(theirs, sum(loss.weight * value for loss, value in zip(losses, values, strict=True)), student)


needs_trl = pytest.mark.skipif(sys.version_info < (3, 11), reason="TRL needs Python 3.11")


@needs_trl
@pytest.mark.parametrize(("beta", "name"), [(0.0, "forward_kl"), (0.3, "jsd"), (0.5, "jsd"), (1.0, "reverse_kl")])
def test_trl_generalized_jsd(logits, beta, name):
    student, teacher, labels = logits
    trainer = importlib.import_module("trl.experimental.gkd").GKDTrainer
    divergence = Divergence("jsd", beta=beta) if name == "jsd" else name
    for temperature in (1.0, 2.0):
        theirs = trainer.generalized_jsd_loss(
            student[None], teacher[None], labels[None], beta=beta, temperature=temperature
        )
        options = {"divergence": divergence, "temperature": temperature, "alpha": 1.0}
        agree(theirs, distill_loss(student, teacher, labels, scale_t2=False, **options), student, 1e-5)
        agree(theirs, distill_loss(student, teacher, labels, **options) / temperature**2, student, 1e-5)
        # Without labels its mean is over sequences, so that a long one counts more.
        theirs = trainer.generalized_jsd_loss(student[None], teacher[None], beta=beta, temperature=temperature)
        agree(theirs, distill_loss(student, teacher, scale_t2=False, **options) * N, student, 1e-4)


@needs_trl
@pytest.mark.parametrize(("beta", "name"), [(0.0, "forward_kl"), (0.4, "jsd"), (1.0, "reverse_kl")])
def test_trl_chunked_divergence(beta, name):
    """Per token, in nats, without T^2, from hidden states; our LMHead takes the same."""
    function = importlib.import_module("trl.kernels.chunked_divergence").ChunkedDivergenceFunction
    hidden, wide = torch.randn(N, 8, requires_grad=True), torch.randn(N, 16)
    weight, teacher_weight = torch.randn(V, 8), torch.randn(V, 16)
    theirs, _ = function.apply(hidden, weight, None, wide, teacher_weight, None, beta, 2.0, 1.0, None, 1.0, None)
    ours = distill_loss(
        kdfast.LMHead(hidden, weight),
        kdfast.LMHead(wide, teacher_weight),
        divergence=Divergence("jsd", beta=beta) if name == "jsd" else name,
        temperature=2.0,
        scale_t2=False,
        reduction="none",
    )
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
    agree(theirs.sum(), ours.sum(), hidden, 1e-4)


def test_torchtune(logits):
    student, teacher, labels = logits
    losses = module("torchtune.modules.loss.kd_losses")
    counted = labels != -100
    left = entropy(teacher)[counted].mean()
    forward = distill_loss(student, teacher, labels, alpha=1.0)
    reverse = distill_loss(student, teacher, labels, alpha=1.0, divergence="reverse_kl")
    agree(losses.ForwardKLLoss()(student, teacher, labels), forward + left, student, 1e-5)
    agree(losses.ReverseKLLoss()(student, teacher, labels), reverse, student, 1e-5)
    ours = distill_loss(student, teacher, labels, alpha=1.0, divergence={"forward_kl": 0.3, "reverse_kl": 0.7})
    agree(losses.SymmetricKLLoss(sym_kd_ratio=0.3)(student, teacher, labels), ours + 0.3 * left, student, 1e-5)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_modelopt(logits, temperature):
    student, teacher, _ = logits
    losses = module("modelopt.torch.distill.losses")
    ours = distill_loss(student, teacher, temperature=temperature)
    agree(losses.LogitsDistillationLoss(temperature)(student, teacher), ours / V, student)  # a mean over columns too
    theirs = losses.LogitsDistillationLoss(temperature, reduction="batchmean")(student, teacher)
    agree(theirs, ours, student)
    theirs = losses.LogitsDistillationLoss(temperature, reduction="none")(student, teacher)
    torch.testing.assert_close(theirs, distill_loss(student, teacher, temperature=temperature, reduction="none"))


def test_modelopt_balanced(logits):
    """What ``compute_kd_loss(student_loss=...)`` returns of a converted model."""
    student, teacher, labels = logits
    labels = labels.clamp(min=0)
    loss = module("modelopt.torch.distill.losses").LogitsDistillationLoss(temperature=2.0, reduction="batchmean")
    balancer = module("modelopt.torch.distill.loss_balancers").StaticLossBalancer(0.8)
    terms = {"student_loss": F.cross_entropy(student, labels), "LogitsDistillationLoss_0": loss(student, teacher)}
    agree(balancer(terms), distill_loss(student, teacher, labels, temperature=2.0, alpha=0.8), student)


@pytest.mark.parametrize("temperature", [1.0, 8.0])
def test_textbrewer(logits, temperature):
    student, teacher, _ = logits
    losses = module("textbrewer.losses")
    theirs = losses.kd_ce_loss(student, teacher, temperature)
    ours = distill_loss(student, teacher, temperature=temperature) / temperature**2
    agree(theirs, ours + entropy(teacher, temperature).mean(), student)


def test_distillkit_sparse(logits):
    """Its formulas, from its source (commit 361c7ac): nothing of it is in a package index."""
    student, teacher, _ = logits
    kept = kdfast.soft_targets(teacher, k=5)
    exact = teacher.log_softmax(-1).gather(-1, kept.ids.long())
    p = student.log_softmax(-1).gather(-1, kept.ids.long())
    mass, of_student = exact.exp().sum(-1), p.exp().sum(-1)
    bucket = (exact.exp() * (exact - p)).sum(-1) + (1 - mass) * ((1 - mass) / (1 - of_student)).log()
    agree(bucket.mean(), distill_loss(student, kept, tail="bucket"), student, 1e-5)  # its symmetric_uniform
    scaled = exact - mass.log()[:, None]
    zero = (scaled.exp() * (scaled - p)).sum(-1).mean()  # its default, whose teacher is scaled to 1
    agree(zero, distill_loss(student, kept, tail="renorm"), student, 1e-5)
