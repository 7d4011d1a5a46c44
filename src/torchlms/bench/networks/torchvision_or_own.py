"""torchvision's networks where it imports, otherwise ours: the same structure, names and counts."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

from torchlms.bench.networks.alexnet import AlexNet
from torchlms.bench.networks.googlenet import GoogLeNet
from torchlms.bench.networks.resnet import ResNet
from torchlms.bench.networks.vgg import VGG16

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from torchlms.bench.networks.network import Factory, NetworkOptions

_OWN: dict[str, Callable[[], nn.Module]] = {
    "resnet50": lambda: ResNet((3, 4, 6, 3)),
    "resnet152": lambda: ResNet((3, 8, 36, 3)),
    "googlenet": GoogLeNet,
    "vgg16": VGG16,
    "alexnet": AlexNet,
}

# init_weights=False: torchvision's GoogLeNet would spend a minute in scipy, and warn about it.
_TORCHVISION_OPTIONS: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": False},
}


@lru_cache(maxsize=1)
def torchvision() -> Any | None:
    """The torchvision package, or None where it is absent or made for another torch."""
    try:
        import torchvision.models  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except (ImportError, OSError, RuntimeError):  # a torch mismatch is a RuntimeError at import
        return None
    return torchvision


def own(name: str) -> nn.Module:
    """Our own definition of a torchvision network."""
    return _OWN[name]()


def factory(name: str) -> Factory:
    """The factory of a torchvision network, decided when it is called."""

    def make(options: NetworkOptions) -> nn.Module:
        package = torchvision()
        if package is None:
            return own(name)
        constructor = getattr(package.models, name)
        return cast("nn.Module", constructor(weights=None, **_TORCHVISION_OPTIONS.get(name, {})))

    return make


def source(name: str) -> str:
    """Where the definition of a network comes from; results name it, as initial weights differ."""
    package = torchvision()
    if name not in _OWN or package is None:
        return "torchlms"
    return f"torchvision {package.__version__}"
