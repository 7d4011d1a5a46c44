"""ResNet-50 on one image of high resolution: how far up does it go within a device memory budget?

    python examples/resnet_high_resolution.py --image-size 6000 --budget 40GiB      # on a GPU

Activations grow with the number of pixels, parameters do not: at 6000x6000 nearly all memory is
activations. The image and its label are random, for the point is memory and speed.
"""

import argparse
import time

import torch
import torch.nn.functional as F

import torchlms
from torchlms.bench.networks.resnet import ResNet  # torchvision's resnet50() will do as well

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", default=None if ON_GPU else "256MiB", help="such as 16GiB")
    parser.add_argument("--image-size", type=int, default=3000 if ON_GPU else 256, help="pixels a side")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--no-lms", action="store_true", help="the same without LMS, to compare")
    options = parser.parse_args()

    torch.manual_seed(0)
    model = ResNet((3, 4, 6, 3)).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    images = torch.randn(options.batch_size, 3, options.image_size, options.image_size, device=DEVICE)
    labels = torch.randint(0, 1000, (options.batch_size,), device=DEVICE)

    lms = None if options.no_lms else torchlms.enable(model, optimizer, budget=options.budget)
    for step in range(options.steps):
        start = time.perf_counter()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}: loss {loss.item():.4f}, {time.perf_counter() - start:.2f} s")
    torchlms.disable()
    if lms is not None:
        print(lms.report())


if __name__ == "__main__":
    main()
