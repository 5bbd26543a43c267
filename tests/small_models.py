"""Classifiers of a few numbers, a loss that is not kdfast's, and KD of two of them in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from kdfast.methods import Loss

B, F_IN, H, C = 6, 4, 8, 5


def mlp(hidden=H, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(F_IN, hidden), nn.ReLU(), nn.Dropout(0.5 if seed else 0.0), nn.Linear(hidden, C))


def pair():
    return mlp(), mlp(2 * H, seed=1)


def batch(n=B):
    return torch.randn(n, F_IN), torch.randint(C, (n,))


class Hint(Loss):
    """Mean squared distance of a projected layer: what a feature loss of a user's own looks like."""

    default_name = "hint"
    needs_shapes = True

    def __init__(self, student, teacher, **options):
        super().__init__(**options)
        self.student_layers, self.teacher_layers = (student,), (teacher,)

    def prepare(self, step):
        a, b = step.student.layer(self.student_layers[0]), step.teacher.layer(self.teacher_layers[0])
        self.projector = nn.Linear(a.shape[-1], b.shape[-1])
        super().prepare(step)

    def forward(self, step):
        a, b = step.student.layer(self.student_layers[0]), step.teacher.layer(self.teacher_layers[0])
        return (self.projector(a) - b).square().mean()


def by_hand(student, teacher, x, y, temperature=4.0, alpha=0.9):
    teacher.eval()
    z, t = student(x).double(), teacher(x).double()
    p, q = F.log_softmax(z / temperature, -1), F.log_softmax(t / temperature, -1)
    soft = temperature**2 * (q.exp() * (q - p)).sum(-1).mean()
    return alpha * soft + (1 - alpha) * F.cross_entropy(z, y), soft, F.cross_entropy(z, y)


def gradients(model):
    return [p.grad.clone() for p in model.parameters()]


def close(a, b, **options):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, **{"rtol": 1e-5, "atol": 1e-6, **options})
