"""DistillLoss: options set once, tensors among them, copies, pickles, and options that are wrong."""

from __future__ import annotations

import ast
import copy
import inspect
import io
import pickle

import pytest
import torch
from torch import nn

from kdfast import DistillLoss, Divergence, distill_loss

OPTIONS = {"divergence": Divergence("jsd", beta=0.3), "temperature": 2.0, "alpha": 0.7, "z_loss": 1e-3}


@pytest.fixture
def batch():
    return torch.randn(6, 20), torch.randn(6, 20), torch.randint(20, (6,))


def same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_is_distill_loss_with_options(batch):
    same(DistillLoss(**OPTIONS)(*batch), distill_loss(*batch, **OPTIONS))
    same(DistillLoss()(*batch), distill_loss(*batch))
    student, teacher, labels = batch
    same(DistillLoss()(student, teacher), distill_loss(student, teacher))
    same(DistillLoss()(student, labels=labels), distill_loss(student, labels=labels))


def test_a_type_checker_sees_the_options_of_the_signature():
    tree = ast.parse(inspect.getsource(inspect.getmodule(distill_loss)))
    (options,) = (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == "Options")
    declared = {n.target.id: ast.unparse(n.annotation) for n in options.body if isinstance(n, ast.AnnAssign)}
    parameters = inspect.signature(distill_loss).parameters.values()
    taken = {p.name: p.annotation for p in parameters if p.kind is p.KEYWORD_ONLY and "return_" not in p.name}
    assert declared == {name: ast.unparse(ast.parse(annotation)) for name, annotation in taken.items()}
    with pytest.raises(TypeError, match=r"distill_loss\(\) got an unexpected keyword argument 'tau'"):
        distill_loss(torch.zeros(1, 2), torch.zeros(1, 2), tau=2.0)


def test_options_of_one_call_win(batch):
    criterion = DistillLoss(**OPTIONS)
    weights = torch.rand(6)
    want = distill_loss(*batch, **OPTIONS | {"temperature": 3.0, "weights": weights, "num_items": 9})
    same(criterion(*batch, temperature=3.0, weights=weights, num_items=9), want)
    same(criterion(*batch), distill_loss(*batch, **OPTIONS))
    terms = criterion(*batch, return_terms=True)
    same(terms.loss, criterion(*batch))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies(batch, how):
    criterion = DistillLoss(
        **OPTIONS | {"temperature": nn.Parameter(torch.tensor(2.5)), "z_loss": torch.tensor(1e-2), "reduction": "sum"}
    )
    if how == "deepcopy":
        other = copy.deepcopy(criterion)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(criterion))
    else:
        buffer = io.BytesIO()
        torch.save(criterion, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    same(other(*batch), criterion(*batch))
    assert repr(other) == repr(criterion)
    with torch.no_grad():
        other.temperature.fill_(1.0)
    assert criterion.temperature.item() == 2.5  # nothing is shared


def test_learned_temperature(batch):
    criterion = DistillLoss(temperature=nn.Parameter(torch.tensor(2.0)))
    assert [name for name, _ in criterion.named_parameters()] == ["temperature"]
    criterion(*batch).backward()
    tau = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    student, teacher, labels = batch
    distill_loss(student.double(), teacher.double(), labels, temperature=tau).backward()
    torch.testing.assert_close(criterion.temperature.grad.double(), tau.grad, rtol=1e-4, atol=1e-6)
    torch.optim.SGD(criterion.parameters(), lr=0.1).step()
    torch.testing.assert_close(criterion.temperature.double(), 2.0 - 0.1 * tau.grad, rtol=1e-6, atol=1e-6)
    other = DistillLoss(temperature=nn.Parameter(torch.tensor(1.0)))
    other.load_state_dict(criterion.state_dict())
    same(other(*batch), criterion(*batch))


def test_a_model_that_holds_it_keeps_its_state_dict():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)
            self.criterion = DistillLoss(temperature=torch.tensor(2.0), alpha=torch.tensor(0.5))

    assert list(Model().state_dict()) == ["layer.weight", "layer.bias"]


def test_tensors_move_with_the_module(batch):
    criterion = DistillLoss(alpha=torch.tensor(0.7), temperature=nn.Parameter(torch.tensor(2.0)))
    same(criterion(*batch), distill_loss(*batch, alpha=0.7, temperature=2.0))
    moved = copy.deepcopy(criterion).to("meta")
    assert {t.device.type for t in (moved.alpha, moved.temperature)} == {"meta"}
    criterion.alpha.fill_(0.1)  # a schedule writes into its buffer
    same(criterion(*batch), distill_loss(*batch, alpha=0.1, temperature=2.0))


def test_teacher_weights_of_an_ensemble(batch):
    student, teacher, labels = batch
    teachers = [teacher, torch.randn(6, 20)]
    for weights in ([1.0, 3.0], torch.tensor([1.0, 3.0])):
        got = DistillLoss(teacher_weights=weights)(student, teachers, labels)
        same(got, distill_loss(student, teachers, labels, teacher_weights=[1.0, 3.0]))


def test_repr_shows_the_options():
    text = repr(DistillLoss(divergence="tvd", temperature=2.0))
    assert "divergence='tvd'" in text
    assert "temperature=2.0" in text


def test_is_a_part_of_a_graph(batch):
    student, teacher, labels = batch
    layer = nn.Linear(20, 20)
    DistillLoss(**OPTIONS)(layer(student), teacher, labels).backward()
    assert layer.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("options", "error", "fragment"),
    [
        ({"tau": 2.0}, TypeError, "'tau'"),
        ({"student": torch.zeros(1, 2)}, TypeError, "'student'"),
        ({"return_terms": True}, TypeError, "'return_terms'"),
        ({"divergence": "kl"}, ValueError, "'kl'"),
        ({"divergence": {"jsd": -1.0}}, ValueError, "-1.0"),
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"temperature": "hot"}, TypeError, "temperature"),
        ({"label_smoothing": 2.0}, ValueError, "label_smoothing"),
        ({"z_loss": -1.0}, ValueError, "z_loss"),
        ({"reduction": "batchmean"}, ValueError, "reduction"),
        ({"ensemble": "vote"}, ValueError, "ensemble"),
        ({"vocab": "pad"}, ValueError, "vocab"),
        ({"tail": "drop"}, ValueError, "tail"),
        ({"memory_budget": -1}, ValueError, "memory_budget"),
        ({"num_items": 3, "reduction": "sum"}, ValueError, "num_items"),
        ({"alpha": 2.0}, ValueError, "alpha"),
        ({"backend": "tpu"}, ValueError, "backend"),
    ],
)
def test_wrong_options_raise_at_once(options, error, fragment):
    with pytest.raises(error, match=fragment):
        DistillLoss(**options)


def test_the_unknown_option_lists_the_known_in_order():
    with pytest.raises(TypeError) as caught:
        DistillLoss(tau=1.0)
    message = str(caught.value)
    assert (
        message.index("divergence") < message.index("temperature") < message.index("alpha") < message.index("backend")
    )
