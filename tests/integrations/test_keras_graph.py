"""ForgetfulGraph: the same computation as Keras's own, holding less while it runs."""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sessions import bits
from trained import SMALL, peak_bytes

keras = pytest.importorskip("keras")
if keras.backend.backend() != "torch":
    pytest.skip("Keras was imported with another backend", allow_module_level=True)

import torchlms.integrations.keras  # noqa: E402
from torchlms.integrations.keras_graph import ForgetfulGraph, forget_early  # noqa: E402

layers = keras.layers


class Spy(layers.Layer):  # type: ignore[misc]
    """Counts which of the outputs of all spies are alive when this one is called."""

    alive: list[int]
    seen: list[weakref.ref[Any]]

    def call(self, inputs: Any) -> Any:
        Spy.alive.append(sum(reference() is not None for reference in Spy.seen))
        outputs = inputs + 1
        Spy.seen.append(weakref.ref(outputs))
        return outputs


@pytest.fixture(autouse=True)
def fresh_spy() -> None:
    Spy.alive, Spy.seen = [], []


def chain() -> Any:
    return keras.Sequential([keras.Input((4,)), *(Spy() for _ in range(5))])


def branches() -> Any:
    """Two inputs, a skip, a layer used twice, an output from the middle, and a model within."""
    left, right = keras.Input((4,)), keras.Input((4,))
    shared = layers.Dense(4)
    middle = shared(left)
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(4, activation="relu"), layers.Dropout(0.5)])
    joined = layers.Add()([inner(shared(middle)), right, left])
    return keras.Model([left, right], {"middle": middle, "end": layers.Dense(2)(joined)})


def dead_end() -> Any:
    """A layer with two outputs of which one is read."""
    entry = keras.Input((6,))
    first, _ = keras.ops.split(entry, 2, axis=-1)
    return keras.Model(entry, layers.Dense(2)(first))


def forgetful(model: Any, inputs: Any, **settings: Any) -> Any:
    with ExitStack() as undo:
        forget_early(model, undo)
        return model(inputs, **settings)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("make", [branches, dead_end])
def test_same_results(make: Any, training: bool) -> None:
    def outputs(run: Any) -> list[str]:
        keras.utils.set_random_seed(5)
        model = make()
        inputs = [torch.randn(3, *shape.shape[1:]) for shape in model.inputs]
        found = run(model, inputs if len(inputs) > 1 else inputs[0], training=training)
        return [bits(tensor) for tensor in keras.tree.flatten(found)]

    assert outputs(forgetful) == outputs(lambda model, inputs, **settings: model(inputs, **settings))


def test_outputs_go_after_their_last_use() -> None:
    def alive(run: Any) -> list[int]:
        model, inputs = chain(), torch.zeros(2, 4)
        Spy.alive, Spy.seen = [], []
        run(model, inputs)
        return Spy.alive

    assert alive(lambda model, inputs: model(inputs)) == [0, 1, 2, 3, 4]
    assert alive(forgetful) == [0, 1, 1, 1, 1]


def test_models_within_are_found_and_all_is_put_back() -> None:
    model = branches()
    with ExitStack() as undo:
        forget_early(model, undo)
        inner = next(layer for layer in model.layers if isinstance(layer, keras.Sequential))
        assert isinstance(model._run_through_graph, ForgetfulGraph)
        assert isinstance(inner._functional._run_through_graph, ForgetfulGraph)
    for graph in (model, inner._functional):
        assert "_run_through_graph" not in vars(graph)


def test_shapes_are_computed_by_keras() -> None:
    model = chain()
    with ExitStack() as undo:
        forget_early(model, undo)
        assert model.compute_output_shape((7, 4)) == (7, 4)
        assert tuple(model(keras.Input((4,))).shape) == (None, 4)


def test_a_model_of_ones_own_is_left_alone() -> None:
    class Own(keras.Model):  # type: ignore[misc]
        def call(self, inputs: Any) -> Any:
            return inputs * 2

    assert float(forgetful(Own(), torch.ones(1)).sum()) == 2


def test_without_it_the_budget_would_not_do(monkeypatch: pytest.MonkeyPatch, spill_dir: Path) -> None:
    images, classes = np.zeros((8, 16, 16, 8), "float32"), np.zeros(8, int)

    def train(*callbacks: Any) -> None:
        convolutions = [layers.Conv2D(8, 3, padding="same", activation="relu") for _ in range(12)]
        model = keras.Sequential([keras.Input((16, 16, 8)), *convolutions, layers.Flatten(), layers.Dense(2)])
        model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        model.fit(images, classes, batch_size=8, epochs=5, verbose=0, callbacks=list(callbacks))

    budget = int(0.4 * peak_bytes(train))
    callback = torchlms.integrations.keras.LMSCallback(budget=budget, rules=SMALL, disk_dir=spill_dir)
    train(callback)
    monkeypatch.setattr(torchlms.integrations.keras, "forget_early", lambda *_: None)
    with pytest.raises(RuntimeError, match="smallest budget"):
        train(callback)
