"""Lightning's Trainer and Fabric: same bits with LMS, and nothing of it left afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sessions import bits
from torch import Tensor, nn
from trained import (
    SMALL,
    all_bits,
    assert_off_for_good,
    assert_values_moved,
    csv_steps,
    is_on,
    own_share,
    peak_bytes,
    state_bits,
)

import torchlms

lightning = pytest.importorskip("lightning")

from torchlms.integrations.lightning import FabricLMS, LMSCallback  # noqa: E402

BATCHES, BATCH, EPOCHS = 6, 16, 3

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists"),
]


class Fault(Exception):
    """A mistake in somebody's own code."""


class Images(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, bad: int = -1) -> None:
        generator = torch.Generator().manual_seed(7)
        self.images = torch.randn(BATCHES * BATCH, 3, 16, 16, generator=generator)
        self.classes = torch.randint(0, 10, (BATCHES * BATCH,), generator=generator)
        self.bad = bad

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index == self.bad:
            raise Fault
        return self.images[index], self.classes[index]


def network() -> nn.Module:
    layers: list[nn.Module] = []
    for inputs in (3, 8, 8, 8, 8):
        layers += [nn.Conv2d(inputs, 8, 3, padding=1), nn.BatchNorm2d(8), nn.GELU(), nn.Dropout(0.2)]
    return nn.Sequential(*layers, nn.AvgPool2d(4), nn.Flatten(), nn.Linear(8 * 16, 10))


class Classifier(lightning.LightningModule):  # type: ignore[misc]
    """Notes its losses; ``faulty`` names the hook that raises in the second epoch."""

    def __init__(self, faulty: str = "") -> None:
        super().__init__()
        self.network = network()
        self.losses: list[str] = []
        self.faulty = faulty

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        self._stumble("training_step")
        loss = F.cross_entropy(self.network(batch[0]), batch[1])
        self.losses.append(float(loss.detach()).hex())
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self._stumble("validation_step")
        loss = F.cross_entropy(self.network(batch[0]), batch[1])
        self.losses.append(float(loss).hex())
        self.log("val_loss", loss)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self._stumble("on_before_optimizer_step")

    def _stumble(self, where: str) -> None:
        if self.faulty == where and self.current_epoch == 1:
            assert is_on()
            raise Fault

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 1e-3)


class Duel(Classifier):
    """Two optimizers that take turns, stepped by hand."""

    automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers()[index % 2]
        loss = F.cross_entropy(self.network(batch[0]), batch[1])
        self.losses.append(float(loss.detach()).hex())
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def configure_optimizers(self) -> Any:
        weights = list(self.parameters())
        return torch.optim.Adam(weights[:4], 1e-3), torch.optim.SGD(weights[4:], 1e-2, momentum=0.9)


def loader(shuffle: bool, bad: int = -1) -> Any:
    generator = torch.Generator().manual_seed(11)
    return torch.utils.data.DataLoader(Images(bad), BATCH, shuffle=shuffle, generator=generator)


def make_trainer(directory: Path, *callbacks: Any, **settings: Any) -> Any:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    chosen = {"max_epochs": EPOCHS, "accumulate_grad_batches": 2, "accelerator": "cpu", "logger": False}
    return lightning.Trainer(
        default_root_dir=directory, callbacks=list(callbacks), **{**quiet, **chosen, **settings}
    )


def fit(trainer: Any, module: Classifier | None = None, bad: int = -1, **settings: Any) -> dict[str, Any]:
    """Train always from the same weights; all bits that are left."""
    torch.manual_seed(5)
    module = module or Classifier()
    for weight in module.parameters():
        nn.init.normal_(weight, std=0.1)
    trainer.fit(module, loader(True, bad), loader(False), **settings)
    return {
        "losses": module.losses,
        "parameters": all_bits(module.named_parameters()),
        "buffers": all_bits(module.named_buffers()),
        "states": [state_bits(optimizer) for optimizer in trainer.optimizers],
        "generator": bits(torch.get_rng_state()),
    }


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], int]:
    """A run without the callback, and what it takes."""
    directory = tmp_path_factory.mktemp("plain")
    short = make_trainer(directory, max_steps=2, limit_val_batches=0, enable_checkpointing=False)
    return fit(make_trainer(directory)), peak_bytes(lambda: fit(short))


@pytest.fixture
def callback(plain: tuple[dict[str, Any], int], spill_dir: Path) -> LMSCallback:
    return LMSCallback(budget=int(0.6 * plain[1]), rules=SMALL, disk_dir=spill_dir)


def test_same_bits_with_accumulation_and_validation(plain: Any, tmp_path: Path, spill_dir: Path) -> None:
    path = tmp_path / "steps.csv"
    callback = LMSCallback(budget=int(0.6 * plain[1]), rules=SMALL, disk_dir=spill_dir, csv=path)
    assert fit(make_trainer(tmp_path, callback)) == plain[0]
    assert csv_steps(path) == list(range(EPOCHS * BATCHES))
    assert len(plain[0]["losses"]) == EPOCHS * 2 * BATCHES + 2  # two before training, by the trainer's choice
    assert_values_moved(callback.lms)
    assert_off_for_good()


@pytest.mark.more
def test_it_costs_less_than_a_hundredth(
    plain: Any, tmp_path: Path, spill_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In an epoch of 60 steps: at its end Lightning takes milliseconds to log what it is given."""
    data = torch.utils.data.DataLoader(torch.utils.data.ConcatDataset([Images()] * 10), BATCH)

    def train(callback: Any) -> None:
        trainer = make_trainer(tmp_path, callback, max_epochs=1, enable_checkpointing=False)
        trainer.fit(Classifier(), data)

    options = {"budget": int(0.6 * plain[1]), "rules": SMALL, "disk_dir": spill_dir}
    _, share = own_share(LMSCallback, options, train, monkeypatch)
    assert 0 < share <= 0.01


def test_same_bits_after_a_checkpoint(callback: Any, plain: Any, tmp_path: Path, spill_dir: Path) -> None:
    """Stopped after two epochs and gone on with, plainly and under LMS."""

    def in_two_goes(directory: Path, *callbacks: Any) -> dict[str, Any]:
        fit(make_trainer(directory, *callbacks, max_epochs=2))
        (checkpoint,) = directory.rglob("*.ckpt")
        return fit(make_trainer(directory, *callbacks, max_epochs=4), ckpt_path=str(checkpoint))

    under_lms = in_two_goes(tmp_path / "lms", callback)
    assert under_lms == in_two_goes(tmp_path / "plain")
    assert len(under_lms["losses"]) == 2 * 2 * BATCHES + (2 if under_lms["losses"] else 0)
    assert_values_moved(callback.lms)


def test_several_optimizers(callback: Any, tmp_path: Path) -> None:
    settings = {"accumulate_grad_batches": 1}
    under_lms = fit(make_trainer(tmp_path / "lms", callback, **settings), Duel())
    assert under_lms == fit(make_trainer(tmp_path / "plain", **settings), Duel())
    assert all(under_lms["states"])
    assert_values_moved(callback.lms)


def test_key_figures_are_logged(callback: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on: list[bool] = []
    log_dict = Classifier.log_dict

    def noted(model: Any, figures: Any) -> None:
        on.append(is_on())
        log_dict(model, figures)

    monkeypatch.setattr(Classifier, "log_dict", noted)
    trainer = make_trainer(tmp_path, callback)
    fit(trainer)
    assert trainer.callback_metrics["lms_bytes_out_per_step"] > 0
    assert trainer.callback_metrics["lms_peak_bytes"] <= callback.lms.stats()["budget_bytes"]
    assert trainer.callback_metrics["lms_predicted_step_s"] > 0
    assert "train_loss" in trainer.callback_metrics
    assert on == [False] * EPOCHS, "what a log does is no business of LMS"


@pytest.mark.parametrize("where", ["training_step", "validation_step", "on_before_optimizer_step", "data"])
def test_nothing_stays_after_an_error(where: str, callback: Any, tmp_path: Path, spill_dir: Path) -> None:
    """Also while somebody holds the error: Lightning tells its callbacks."""
    bad = 3 if where == "data" else -1
    with pytest.raises(Fault) as kept:
        fit(make_trainer(tmp_path, callback, num_sanity_val_steps=0), Classifier(where), bad)
    assert callback.lms is not None
    assert_off_for_good()
    assert not list(spill_dir.iterdir())
    del kept


# Fabric: the loop is the user's own.


def make_fabric(*loggers: Any) -> Any:
    return lightning.Fabric(accelerator="cpu", devices=1, loggers=list(loggers))


class Notebook:
    """The least that Fabric takes for a logger."""

    def __init__(self) -> None:
        self.noted: dict[str, float] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.noted.update(metrics)


def parts(fabric: Any) -> tuple[Any, Any, Any]:
    torch.manual_seed(5)
    model = network()
    model, optimizer = fabric.setup(model, torch.optim.Adam(model.parameters(), 1e-3))
    return model, optimizer, fabric.setup_dataloaders(loader(True))


def loop(fabric: Any, model: Any, optimizer: Any, batches: Any) -> Iterator[str]:
    """Two batches to a step, and an evaluation after each epoch."""
    for _ in range(EPOCHS):
        for index, (images, classes) in enumerate(batches):
            loss = F.cross_entropy(model(images), classes)
            fabric.backward(loss)
            if index % 2:
                optimizer.step()
                optimizer.zero_grad()
            yield float(loss.detach()).hex()
        model.eval()
        with torch.no_grad():
            yield float(model(images).sum()).hex()
        model.train()


def test_fabric_same_bits(plain: Any, spill_dir: Path) -> None:
    book = Notebook()
    fabric = make_fabric(book)
    model, optimizer, batches = parts(fabric)
    with FabricLMS(
        fabric, model, optimizer, budget=int(0.6 * plain[1]), rules=SMALL, disk_dir=spill_dir
    ) as lms:
        losses = list(loop(fabric, model, optimizer, batches))
        assert_values_moved(lms)
    assert_off_for_good()
    assert book.noted["lms_bytes_out_per_step"] > 0

    fabric = make_fabric()
    model_again, optimizer_again, batches = parts(fabric)
    assert losses == list(loop(fabric, model_again, optimizer_again, batches))
    assert all_bits(model.state_dict().items()) == all_bits(model_again.state_dict().items())
    assert state_bits(optimizer) == state_bits(optimizer_again)


def test_fabric_with_several_optimizers(plain: Any, spill_dir: Path) -> None:
    """The states of each are known as such."""
    fabric = make_fabric()
    torch.manual_seed(5)
    model = network()
    weights = list(model.parameters())
    several = torch.optim.Adam(weights[:4], 1e-3), torch.optim.SGD(weights[4:], 1e-2, momentum=0.9)
    model, *optimizers = fabric.setup(model, *several)
    images, classes = next(iter(loader(True)))
    options = {"budget": int(0.6 * plain[1]), "rules": SMALL, "disk_dir": spill_dir}
    with FabricLMS(fabric, model, optimizers, **options) as lms:
        for _ in range(4):
            fabric.backward(F.cross_entropy(model(images), classes))
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        assert_values_moved(lms)
    assert_off_for_good()
    with pytest.raises(TypeError, match="the fabric comes first"):
        FabricLMS(model, optimizers[0])


def test_fabric_names_modules_as_the_user_does(plain: Any, spill_dir: Path) -> None:
    """Rules and the report speak of the network itself, not of Fabric's wrapper."""
    fabric = make_fabric()
    model, optimizer, batches = parts(fabric)
    with FabricLMS(
        fabric, model, optimizer, budget=int(0.6 * plain[1]), rules=SMALL, disk_dir=spill_dir
    ) as lms:
        list(loop(fabric, model, optimizer, batches))
    assert lms.tape is not None
    assert {op.module for op in lms.tape.ops} >= {"0", "1", "4", "22"}


def test_fabric_after_an_error(spill_dir: Path) -> None:
    book = Notebook()
    fabric = make_fabric(book)
    model, optimizer, batches = parts(fabric)

    def stumble() -> None:
        with FabricLMS(fabric, model, optimizer, disk_dir=spill_dir):
            next(loop(fabric, model, optimizer, batches))
            raise Fault

    with pytest.raises(Fault):
        stumble()
    assert not book.noted
    assert_off_for_good()


def test_fabric_with_what_was_not_set_up(spill_dir: Path) -> None:
    """A plain model and optimizer are taken as they are."""
    model = network()
    with FabricLMS(make_fabric(), model, torch.optim.SGD(model.parameters(), 0.1), disk_dir=spill_dir) as lms:
        assert isinstance(lms, torchlms.LMS)
