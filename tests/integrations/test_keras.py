"""Keras 3 on torch: same bits with the callback, at load_model too, and nothing of it left afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sessions import bits
from trained import SMALL, assert_off_for_good, assert_values_moved, csv_steps, is_on, own_share, peak_bytes

from torchlms.core.tape import Kind

keras = pytest.importorskip("keras")
if keras.backend.backend() != "torch":
    pytest.skip("Keras was imported with another backend", allow_module_level=True)

from torchlms.integrations.keras import LMSCallback  # noqa: E402

EPOCHS, BATCH = 3, 16
IMAGES = np.random.default_rng(7).normal(size=(6 * BATCH, 16, 16, 3)).astype("float32")
CLASSES = np.random.default_rng(8).integers(0, 10, size=6 * BATCH)


class Fault(Exception):
    """A mistake in somebody's own code."""


def make_model() -> Any:
    """Accumulation by Keras's own optimizer, dropout, batch normalisation."""
    keras.utils.set_random_seed(5)
    layers = keras.layers
    model = keras.Sequential([keras.Input((16, 16, 3))])
    for _ in range(5):
        model.add(layers.Conv2D(8, 3, padding="same"))
        model.add(layers.BatchNormalization())
        model.add(layers.Activation("gelu"))
        model.add(layers.Dropout(0.2))
    model.add(layers.AveragePooling2D(4))
    model.add(layers.Flatten())
    model.add(layers.Dense(10))
    model.compile(
        optimizer=keras.optimizers.Adam(1e-3, gradient_accumulation_steps=2),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def fit(model: Any, *callbacks: Any, **settings: Any) -> dict[str, Any]:
    """Train; all bits that are left."""
    chosen = {"epochs": EPOCHS, "batch_size": BATCH, "verbose": 0, "shuffle": False, **settings}
    history = model.fit(
        IMAGES,
        CLASSES,
        validation_data=(IMAGES[:BATCH], CLASSES[:BATCH]),
        callbacks=list(callbacks),
        **chosen,
    )
    return {
        "history": {key: values for key, values in history.history.items() if not key.startswith("lms")},
        "weights": [bits(weight.value) for weight in model.weights],
        "states": [bits(variable.value) for variable in model.optimizer.variables],
    }


@pytest.fixture(scope="module")
def plain() -> tuple[dict[str, Any], int]:
    """A run without the callback, and what it takes."""
    return fit(make_model()), peak_bytes(lambda: fit(make_model(), epochs=1))


@pytest.fixture
def callback(plain: tuple[dict[str, Any], int], spill_dir: Path) -> LMSCallback:
    return LMSCallback(budget=int(0.6 * plain[1]), rules=SMALL, disk_dir=spill_dir)


def test_same_bits_with_accumulation_and_validation(plain: Any, tmp_path: Path, spill_dir: Path) -> None:
    path = tmp_path / "steps.csv"
    callback = LMSCallback(budget=int(0.6 * plain[1]), rules=SMALL, disk_dir=spill_dir, csv=path)
    assert fit(make_model(), callback) == plain[0]
    steps = csv_steps(path)
    assert steps == list(range(len(steps)))
    assert len(steps) % len(plain[0]["history"]["loss"]) == 0
    assert "val_loss" in plain[0]["history"]
    assert_values_moved(callback.lms)
    assert_off_for_good()


@pytest.mark.more
def test_it_costs_less_than_a_hundredth(plain: Any, spill_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"budget": int(0.6 * plain[1]), "rules": SMALL, "disk_dir": spill_dir}
    _, share = own_share(LMSCallback, options, lambda own: fit(make_model(), own, epochs=9), monkeypatch)
    assert 0 < share <= 0.01


def test_same_bits_after_load_model(callback: Any, tmp_path: Path) -> None:
    """Saved while LMS is on, loaded, and trained on; nothing of LMS is in the file."""

    def in_two_goes(path: Path, *callbacks: Any) -> dict[str, Any]:
        fit(make_model(), *callbacks, keras.callbacks.ModelCheckpoint(path), epochs=2)
        return fit(keras.saving.load_model(path), *callbacks)

    under_lms = in_two_goes(tmp_path / "lms.keras", callback)
    assert_values_moved(callback.lms)
    assert under_lms == in_two_goes(tmp_path / "plain.keras")


def test_evaluate_and_predict_before_and_after(callback: Any) -> None:
    def all_of_it(model: Any, *callbacks: Any) -> list[Any]:
        before = model.evaluate(IMAGES, CLASSES, verbose=0)
        fit(model, *callbacks)
        return [
            before,
            model.evaluate(IMAGES, CLASSES, verbose=0),
            model.predict(IMAGES, verbose=0).tobytes(),
        ]

    assert all_of_it(make_model(), callback) == all_of_it(make_model())


def test_states_of_the_optimizer_are_known_as_such(callback: Any) -> None:
    """Two moments lie there in the step that is recorded; the gradient that is accumulated is written."""
    model = make_model()
    fit(model, callback)
    tape = callback.lms.tape
    weights_bytes = sum(weight.value.nbytes for weight in model.trainable_weights)
    states_bytes = sum(value.size_bytes for value in tape.values if value.kind is Kind.STATE)
    assert states_bytes >= weights_bytes
    assert tape.resident_bytes + states_bytes >= 2.9 * weights_bytes


def test_key_figures_are_in_the_history(callback: Any) -> None:
    model = make_model()
    fit(model, callback)
    history = model.history.history
    assert len(history["lms_peak_bytes"]) == EPOCHS
    assert history["lms_bytes_out_per_step"][-1] > 0
    assert history["lms_peak_bytes"][-1] <= callback.lms.stats()["budget_bytes"]


class StumblingLayer(keras.layers.Layer):  # type: ignore[misc]
    """Raises under LMS: in the third step, or in validation."""

    def __init__(self, in_training: bool) -> None:
        super().__init__()
        self.in_training = in_training
        self.calls = 0

    def call(self, inputs: Any, training: bool = False) -> Any:
        if is_on() and bool(training) is self.in_training:
            self.calls += 1
            if self.calls == 3:
                raise Fault
        return inputs


class StumblingCallback(keras.callbacks.Callback):  # type: ignore[misc]
    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        assert is_on()
        raise Fault


def with_layer(layer: Any) -> Any:
    model = keras.Sequential([layer, make_model()])
    model.compile(optimizer="adam", loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


@pytest.mark.parametrize("where", ["training", "validation", "callback"])
def test_nothing_stays_after_an_error(where: str, callback: Any, spill_dir: Path) -> None:
    """Keras makes a ring of an error in a layer, its traceback and its frames: the frames stay a while."""
    others = [StumblingCallback()] if where == "callback" else []
    model = make_model() if others else with_layer(StumblingLayer(where == "training"))
    names = set(vars(model))
    with pytest.raises(Fault):
        fit(model, callback, *others)
    assert callback.lms is not None
    assert_off_for_good()
    assert not list(spill_dir.iterdir())
    assert "torchlms" not in str([vars(layer).get("_run_through_graph") for layer in model._flatten_layers()])
    assert set(vars(model)) - names <= {"test_function", "_eval_epoch_iterator", "history", "stop_evaluating"}
    assert "_Guarded" not in f"{model.train_function} {model.test_function}"


def test_guarded_once_however_often_it_validates(callback: Any) -> None:
    depths = []

    class Look(keras.callbacks.Callback):  # type: ignore[misc]
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            function, depth = self.model.test_function, 0
            while "_Guarded" in str(function):
                function, depth = function._inner, depth + 1
            depths.append(depth)

    fit(make_model(), callback, Look())
    assert depths == [1] * EPOCHS


def test_interrupted(callback: Any) -> None:
    """Ctrl-C is no Exception and passes Keras by."""

    class Interrupt(keras.callbacks.Callback):  # type: ignore[misc]
        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(make_model(), callback, Interrupt())
    assert_off_for_good()


def test_not_compiled_by_default(callback: Any) -> None:
    """What the other tests rest on: ops run one by one."""
    model = make_model()
    fit(model, callback)
    assert not model.jit_compile
    assert torch.is_grad_enabled()
