"""The networks that the benchmark knows."""

from __future__ import annotations

from torchlms.bench.networks.cifar10_full import Cifar10Full
from torchlms.bench.networks.llama import make_llama, token_batch, token_loss
from torchlms.bench.networks.mnist import Mnist
from torchlms.bench.networks.network import Network, NetworkOptions, classification_loss, image_batch
from torchlms.bench.networks.torchvision_or_own import factory, source
from torchlms.bench.networks.unet3d import make_unet3d, volume_batch, voxel_loss
from torchlms.bench.networks.user import load_user_network
from torchlms.errors import BadOption

__all__ = ["NETWORKS", "Network", "NetworkOptions", "get_network", "source"]


def _imagenet(name: str, description: str, *, batch_size: int, least: int = 32) -> Network:
    return Network(
        name=name,
        description=description,
        factory=factory(name),
        make_batch=image_batch(),
        loss=classification_loss,
        default_batch_size=batch_size,
        default_image_size=224,
        least_image_size=least,
    )


def _small(name: str, description: str, *, channels: int, image_size: int) -> Network:
    constructors = {"cifar10_full": Cifar10Full, "mnist": Mnist}
    return Network(
        name=name,
        description=description,
        factory=lambda options: constructors[name](image_size=options.image_size),
        make_batch=image_batch(channels, 10),
        loss=classification_loss,
        default_batch_size=128,
        default_image_size=image_size,
        least_image_size=8,
    )


NETWORKS: dict[str, Network] = {
    network.name: network
    for network in (
        _imagenet("alexnet", "AlexNet, 61.1 M weights", batch_size=128, least=63),
        _small("cifar10_full", "Caffe's cifar10_full, 32x32 images", channels=3, image_size=32),
        _imagenet("googlenet", "GoogLeNet with BatchNorm, 6.6 M weights", batch_size=64),
        Network(
            name="llama",
            description="language model of Llama's shape (--hidden --layers --heads --sequence --vocab)",
            factory=make_llama,
            make_batch=token_batch,
            loss=token_loss,
            default_batch_size=8,
            default_optimizer="adamw",
            unit="tokens",
            items_per_sample=lambda options: options.sequence,
            data_format="tokens",
        ),
        _small("mnist", "TensorFlow's deep MNIST, 28x28 images", channels=1, image_size=28),
        _imagenet("resnet50", "ResNet-50, 25.6 M weights", batch_size=64),
        _imagenet("resnet152", "ResNet-152, 60.2 M weights", batch_size=32),
        Network(
            name="unet3d",
            description="3D U-Net for volumes of 4 channels (--width --norm)",
            factory=make_unet3d,
            make_batch=volume_batch,
            loss=voxel_loss,
            default_batch_size=1,
            default_image_size=128,
            least_image_size=16,
            unit="volumes",
            data_format="NCDHW",
        ),
        _imagenet("vgg16", "VGG-16, 138.4 M weights", batch_size=64),
    )
}


def get_network(name: str) -> Network:
    """The network of that name, or of ``package.module:factory``."""
    if name in NETWORKS:
        return NETWORKS[name]
    if ":" in name:
        return load_user_network(name)
    known = ", ".join(NETWORKS)
    raise BadOption(f"--model {name}: unknown. Known: {known}; or package.module:factory for your own")
