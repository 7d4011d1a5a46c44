"""The MNIST network in Keras 3 on its torch backend, within a device memory budget.

python examples/mnist_keras.py          # scikit-learn's 8x8 digits, no download
"""

import argparse
import os
import tempfile
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import torch
from keras import layers
from sklearn.datasets import load_digits

from torchlms.integrations.keras import LMSCallback

ON_GPU = torch.cuda.is_available()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", default=None if ON_GPU else "14MiB", help="such as 16GiB")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=4)
    options = parser.parse_args()

    found = load_digits()
    images, labels = found.images[..., None] / 16, found.target
    # Six even batches to learn from: see docs/trainers.md on a last batch of another size.
    callback = LMSCallback(budget=options.budget)
    training = {
        "batch_size": options.batch_size,
        "epochs": options.epochs,
        "verbose": 2,
        "validation_data": (images[1536:], labels[1536:]),
        "callbacks": [callback],  # this line is all
    }
    model = network()
    model.fit(images[:1536], labels[:1536], **training)

    path = Path(tempfile.mkdtemp()) / "digits.keras"
    model.save(path)
    model = keras.saving.load_model(path)
    model.fit(images[:1536], labels[:1536], **training)  # under LMS again
    print(callback.lms.report())


def network() -> keras.Model:
    """Two convolutions and two dense layers, for images of 8x8."""
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(32, 5, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(64, 5, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(1024, activation="relu"),
            layers.Dropout(0.5),
            layers.Dense(10),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer="adam", loss=loss, metrics=["accuracy"])
    return model


if __name__ == "__main__":
    main()
