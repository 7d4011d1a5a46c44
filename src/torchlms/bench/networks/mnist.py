"""mnist: the network of TensorFlow's "Deep MNIST for Experts", as in IBM's mnist_deep_lms.py."""

from __future__ import annotations

from torch import Tensor, nn


class Mnist(nn.Module):
    """Two 5x5 convolutions and two linear layers; 3,274,634 weights at 28x28."""

    def __init__(self, *, image_size: int = 28, classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        edge = image_size // 2 // 2
        self.classifier = nn.Sequential(
            nn.Linear(64 * edge * edge, 1024), nn.ReLU(), nn.Dropout(0.5), nn.Linear(1024, classes)
        )
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(module.weight, std=0.1, a=-0.2, b=0.2)
                if module.bias is not None:
                    nn.init.constant_(module.bias, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(x).flatten(1))
        return logits
