"""Hugging Face Trainer: same bits with the callback, and nothing of it left afterwards."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from sessions import bits
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

pytest.importorskip("accelerate", reason="Hugging Face's Trainer needs accelerate")
transformers = pytest.importorskip("transformers")

from torchlms.integrations.huggingface import LMSCallback  # noqa: E402

VOCABULARY, TOKENS, BATCH, ACCUMULATE = 61, 64, 4, 2
STEPS, SAVED_AT = 8, 4


class Tokens(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Sixteen rows of random tokens, always the same; row ``bad`` cannot be read."""

    def __init__(self, bad: int = -1) -> None:
        generator = torch.Generator().manual_seed(7)
        self.rows = torch.randint(0, VOCABULARY, (24, TOKENS), generator=generator)
        self.bad = bad

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index == self.bad:
            raise OSError("this row cannot be read")
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def make_trainer(directory: Path, *callbacks: Any, dataset: Any = None, **arguments: Any) -> Any:
    """A small GPT-2 with dropout; accumulation, an evaluation every three steps, a checkpoint on the way."""
    torch.manual_seed(5)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY, n_positions=TOKENS, n_embd=32, n_layer=3, n_head=2, use_cache=False
        )
    )
    settings: dict[str, Any] = {
        "output_dir": str(directory),
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": ACCUMULATE,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_steps": SAVED_AT,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        "seed": 3,
    }
    return transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(**{**settings, **arguments}),
        train_dataset=dataset or Tokens(),
        eval_dataset=Tokens(),
        callbacks=list(callbacks),
    )


def left_by(trainer: Any) -> dict[str, Any]:
    """All bits that training leaves, and the figures it logged that do not depend on time."""
    logged = [
        {key: value for key, value in entry.items() if key in ("loss", "eval_loss", "grad_norm", "step")}
        for entry in trainer.state.log_history
        if "loss" in entry or "eval_loss" in entry
    ]
    return {
        "logged": logged,
        "parameters": all_bits(trainer.model.named_parameters()),
        "states": state_bits(trainer.optimizer),
        "generator": bits(torch.get_rng_state()),
    }


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], int]:
    """A run without the callback, and what it takes."""
    trainer = make_trainer(tmp_path_factory.mktemp("plain"))
    trainer.train()
    left = left_by(trainer)
    again = make_trainer(tmp_path_factory.mktemp("again"), max_steps=2, eval_strategy="no")
    return left, peak_bytes(again.train)


def options(plain: tuple[dict[str, Any], int], spill_dir: Path, share: float = 0.6) -> dict[str, Any]:
    return {"budget": int(share * plain[1]), "rules": SMALL, "disk_dir": spill_dir}


@pytest.mark.more
def test_it_costs_less_than_a_hundredth(
    plain: Any, tmp_path: Path, spill_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a plain ``with LMS`` around the same training does what the callback has done for it."""
    arguments = {"max_steps": 30, "eval_strategy": "no", "logging_steps": 30}
    trainer = make_trainer(tmp_path / "with", **arguments)
    with torchlms.LMS(trainer.model, trainer.create_optimizer(), **options(plain, spill_dir)) as lms:
        trainer.train()

    def train(callback: Any) -> None:
        make_trainer(tmp_path / "callback", callback, **arguments).train()

    callback, share = own_share(LMSCallback, options(plain, spill_dir), train, monkeypatch)
    assert 0 < share <= 0.01
    for figure in ("steps", "record_steps", "strayed", "state"):
        assert callback.lms.stats()[figure] == lms.stats()[figure], figure


def test_same_bits_with_accumulation_and_evaluation(plain: Any, tmp_path: Path, spill_dir: Path) -> None:
    path = tmp_path / "steps.csv"
    callback = LMSCallback(**options(plain, spill_dir), csv=path)
    trainer = make_trainer(tmp_path, callback)
    trainer.train()
    assert left_by(trainer) == plain[0]
    assert csv_steps(path) == list(range(trainer.state.global_step))
    assert [entry["step"] for entry in plain[0]["logged"] if "eval_loss" in entry] == [3, 6, STEPS]
    assert_values_moved(callback.lms)
    assert_off_for_good()


def test_same_bits_after_a_checkpoint(plain: Any, tmp_path: Path, spill_dir: Path) -> None:
    """The run that saves and the run that goes on are both under LMS."""
    make_trainer(tmp_path, LMSCallback(**options(plain, spill_dir))).train()
    callback = LMSCallback(**options(plain, spill_dir))
    trainer = make_trainer(tmp_path, callback)
    trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{SAVED_AT}"))
    assert left_by(trainer) == plain[0]
    assert callback.lms is not None
    assert callback.lms.stats()["steps"] == (STEPS - SAVED_AT) * ACCUMULATE
    assert_values_moved(callback.lms)


def test_evaluation_and_prediction_before_and_after(plain: Any, tmp_path: Path, spill_dir: Path) -> None:
    def all_of_it(trainer: Any) -> list[Any]:
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        return [before, trainer.evaluate()["eval_loss"], bits(torch.tensor(trainer.predict(Tokens())[0]))]

    trainer = make_trainer(tmp_path / "lms", LMSCallback(**options(plain, spill_dir)), max_steps=3)
    assert all_of_it(trainer) == all_of_it(make_trainer(tmp_path / "plain", max_steps=3))


def test_key_figures_are_logged_and_nothing_else_is_lost(plain: Any, tmp_path: Path, spill_dir: Path) -> None:
    callback = LMSCallback(**options(plain, spill_dir))
    trainer = make_trainer(tmp_path, callback, logging_strategy="epoch", eval_strategy="no")
    trainer.train()
    ours = [entry for entry in trainer.state.log_history if "lms_peak_bytes" in entry]
    assert [entry["epoch"] for entry in ours] == pytest.approx([1.0, 2.0, STEPS * ACCUMULATE / 6])
    assert ours[-1]["lms_bytes_out_per_step"] > 0
    assert ours[-1]["lms_peak_bytes"] <= callback.lms.stats()["budget_bytes"]  # type: ignore[union-attr]
    assert ours[-1]["lms_predicted_step_s"] > 0
    assert sum("loss" in entry for entry in trainer.state.log_history) == len(ours)


def test_a_second_training_gets_an_lms_of_its_own(plain: Any, tmp_path: Path, spill_dir: Path) -> None:
    callback = LMSCallback(**options(plain, spill_dir))
    trainer = make_trainer(tmp_path, callback, max_steps=2)
    trainer.train()
    first = callback.lms
    trainer.train()
    assert callback.lms is not first
    assert_off_for_good()


def test_a_new_batch_size_begins_anew(plain: Any, tmp_path: Path, spill_dir: Path) -> None:
    """`auto_find_batch_size` runs the loop again within one call of train."""

    class TooLarge(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            if state.train_batch_size == BATCH:
                raise RuntimeError("CUDA out of memory. Tried to allocate 1 byte")

    callback = LMSCallback(**options(plain, spill_dir))
    trainer = make_trainer(tmp_path, callback, TooLarge(), max_steps=6, auto_find_batch_size=True)
    trainer.train()
    assert trainer.state.train_batch_size < BATCH
    assert callback.lms is not None
    assert callback.lms.stats()["steps"] == 6 * ACCUMULATE
    assert_off_for_good()


# What is left after an error.


class Fault(Exception):
    """A mistake in somebody's own code."""


def stumble(*_: Any) -> None:
    assert is_on()
    raise Fault


class Stumbling(transformers.TrainerCallback):  # type: ignore[misc]
    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        stumble()


def in_callback(directory: Path, callback: LMSCallback) -> Any:
    return make_trainer(directory, callback, Stumbling())


def in_data(directory: Path, callback: LMSCallback) -> Any:
    return make_trainer(directory, callback, dataset=Tokens(bad=3))


def in_forward(directory: Path, callback: LMSCallback) -> Any:
    trainer = make_trainer(directory, callback)
    trainer.model.lm_head.register_forward_hook(stumble)
    return trainer


def in_backward(directory: Path, callback: LMSCallback) -> Any:
    trainer = make_trainer(directory, callback)
    trainer.model.transformer.wte.weight.register_hook(stumble)
    return trainer


@pytest.mark.parametrize("where", [in_callback, in_data, in_forward, in_backward])
def test_nothing_stays_after_an_error(where: Any, plain: Any, tmp_path: Path, spill_dir: Path) -> None:
    callback = LMSCallback(**options(plain, spill_dir))
    trainer = where(tmp_path, callback)
    with pytest.raises((Fault, OSError)):
        trainer.train()
    assert callback.lms is not None
    assert "_run_epoch" not in vars(trainer)
    assert_off_for_good()
    assert not list(spill_dir.iterdir())


@pytest.mark.parametrize("where", [in_callback, in_data, in_forward, in_backward])
def test_off_while_the_error_is_kept(where: Any, plain: Any, tmp_path: Path, spill_dir: Path) -> None:
    kept = caught(where(tmp_path, LMSCallback(**options(plain, spill_dir))).train)
    assert_off_for_good()
    del kept


# The few errors that pass the guard: those of callbacks between the epochs.


def between_epochs(directory: Path, callback: LMSCallback) -> Any:
    class Early(transformers.TrainerCallback):  # type: ignore[misc]
        def on_epoch_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            stumble()

    return make_trainer(directory, callback, Early())


def test_such_an_error_turns_off_when_it_is_forgotten(plain: Any, tmp_path: Path, spill_dir: Path) -> None:
    kept = caught(between_epochs(tmp_path, LMSCallback(**options(plain, spill_dir))).train)
    assert is_on()  # the traceback holds the frame of train
    del kept
    assert_off_for_good()


def test_such_an_error_turns_off_by_hand(plain: Any, tmp_path: Path, spill_dir: Path) -> None:
    callback = LMSCallback(**options(plain, spill_dir))
    kept = caught(between_epochs(tmp_path, callback).train)
    callback.close()
    assert_off_for_good()
    del kept
    assert_off_for_good()


def test_the_with_form_closes_whatever_is_kept(plain: Any, tmp_path: Path, spill_dir: Path) -> None:
    with LMSCallback(**options(plain, spill_dir)) as callback:
        kept = caught(between_epochs(tmp_path, callback).train)
    assert_off_for_good()
    del kept


def test_the_next_training_takes_off_what_an_error_left(plain: Any, tmp_path: Path, spill_dir: Path) -> None:
    """As in a notebook, which keeps the last error, when its cells are run again."""
    kept = caught(between_epochs(tmp_path, LMSCallback(**options(plain, spill_dir))).train)
    callback = LMSCallback(**options(plain, spill_dir))
    make_trainer(tmp_path, callback, max_steps=4).train()
    assert_values_moved(callback.lms)
    assert_off_for_good()
    del kept


def test_an_lms_that_is_on_is_not_taken_off(plain: Any, tmp_path: Path, spill_dir: Path) -> None:
    trainer = make_trainer(tmp_path, LMSCallback(**options(plain, spill_dir)))
    with torchlms.LMS(device="cpu"):
        with pytest.raises(torchlms.NotSupported, match="on already"):
            trainer.train()
        assert is_on()
    assert_off_for_good()


def caught(train: Any) -> BaseException:
    try:
        train()
    except (Fault, OSError) as error:
        return error
    raise AssertionError("it was to stumble")


# Options, copies, other models.


def test_options_are_read_at_once() -> None:
    with pytest.raises(torchlms.BadOption, match="1 banana"):
        LMSCallback(budget="1 banana")
    with pytest.raises(TypeError, match="LMSCallback has no option 'budgte'; did you mean budget"):
        LMSCallback(budgte="1GiB")
    with pytest.raises(TypeError, match="LMSCallback has no option 'model'; there are csv, budget, "):
        LMSCallback(model=None)
    with pytest.raises(TypeError, match=r"by name, such as LMSCallback\(budget='1GiB'\)"):
        LMSCallback("1GiB")
    with pytest.raises(torchlms.BadOption, match="its folder does not exist"):
        LMSCallback(csv="nowhere/steps.csv")


def test_several_gpus_in_one_process_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replicas would run in threads that LMS does not see."""
    trainer = make_trainer(tmp_path, LMSCallback())
    monkeypatch.setattr(type(trainer.args), "n_gpu", 2)
    with pytest.raises(torchlms.NotSupported, match=r"2 GPUs.*CUDA_VISIBLE_DEVICES"):
        trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)
    assert_off_for_good()


def test_a_copy_has_the_options_only(plain: Any, tmp_path: Path, spill_dir: Path) -> None:
    callback = LMSCallback(**options(plain, spill_dir))
    make_trainer(tmp_path, callback, max_steps=1).train()
    twin = copy.deepcopy(callback)
    assert twin.lms is None
    make_trainer(tmp_path, twin, max_steps=1).train()
    assert twin.lms is not None


def test_an_adapter_of_peft(plain: Any, tmp_path: Path, spill_dir: Path) -> None:
    """Frozen weights, and a few that learn."""
    peft = pytest.importorskip("peft")

    def adapted(name: str, *callbacks: Any) -> Any:
        trainer = make_trainer(tmp_path / name, max_steps=1)
        model = peft.get_peft_model(
            trainer.model, peft.LoraConfig(r=2, task_type="CAUSAL_LM", lora_dropout=0.1)
        )
        arguments = copy.copy(trainer.args)
        arguments.max_steps = 6
        return transformers.Trainer(
            model=model,
            args=arguments,
            train_dataset=Tokens(),
            eval_dataset=Tokens(),
            callbacks=list(callbacks),
        )

    torch.manual_seed(1)
    without = adapted("plain")
    without.train()
    torch.manual_seed(1)
    callback = LMSCallback(**options(plain, spill_dir, share=0.5))
    trainer = adapted("lms", callback)
    trainer.train()
    assert left_by(trainer) == left_by(without)
    assert_values_moved(callback.lms)
