"""Small networks for pictures: teachers and students of the examples."""

from __future__ import annotations

from torch import Tensor, nn


class Perceptron(nn.Module):
    """One hidden layer: ``hidden``, then ``head``; logits (B, classes)."""

    def __init__(self, inputs: int, width: int, classes: int = 10) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Flatten(), nn.Linear(inputs, width), nn.ReLU())
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes) of inputs that are flattened first."""
        logits: Tensor = self.head(self.hidden(x))
        return logits


class TeacherCNN(nn.Module):
    """Two stages of convolution for pictures of 28 x 28, 0.42 M parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.stage1 = nn.Sequential(_convolution(1, 32, 3), nn.MaxPool2d(2))  # (B, 32, 14, 14)
        self.stage2 = nn.Sequential(_convolution(32, 64, 3), nn.MaxPool2d(2))  # (B, 64, 7, 7)
        self.hidden = nn.Sequential(nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 49, 128), nn.ReLU())
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, 10) of pictures (B, 1, 28, 28)."""
        logits: Tensor = self.head(self.hidden(self.stage2(self.stage1(x))))
        return logits


class StudentCNN(nn.Module):
    """The same two stages, narrow and with strides in place of pooling: 21 thousand parameters at width 16."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stage1 = _convolution(1, width, 5, stride=2)  # (B, width, 14, 14)
        self.stage2 = _convolution(width, 2 * width, 3, stride=2)  # (B, 2 width, 7, 7)
        self.hidden = nn.Flatten()
        self.head = nn.Linear(2 * width * 49, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, 10) of pictures (B, 1, 28, 28)."""
        logits: Tensor = self.head(self.hidden(self.stage2(self.stage1(x))))
        return logits


def _convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )
