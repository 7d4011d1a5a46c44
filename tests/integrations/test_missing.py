"""Without a trainer's library: one clear error that names the extra; and nothing is loaded unasked."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import torchlms

LIBRARIES = {"huggingface": "transformers", "keras": "keras", "lightning": "lightning"}


@pytest.mark.parametrize("extra", LIBRARIES)
def test_names_the_extra(extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    library, module = LIBRARIES[extra], f"torchlms.integrations.{extra}"
    for name in list(sys.modules):
        if name.split(".")[0] == library:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(ModuleNotFoundError, match=rf"pip install '\.\[{extra}\]'"):
        importlib.import_module(module)


def test_a_missing_backend_of_keras_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("keras")
    code = (
        "import sys, os; sys.modules['tensorflow'] = None; os.environ['KERAS_BACKEND'] = 'tensorflow'\n"
        "import torchlms.integrations.keras"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "KERAS_BACKEND=torch" in done.stderr.splitlines()[-1]


def test_another_backend_of_keras_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    keras = pytest.importorskip("keras")
    from torchlms.integrations.keras import LMSCallback

    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(torchlms.NotSupported, match=r"jax backend.*KERAS_BACKEND=torch"):
        LMSCallback()


def test_nothing_is_loaded_unasked() -> None:
    code = (
        "import sys, torchlms, torchlms.integrations, torchlms.integrations.keeper\n"
        f"assert not {set(LIBRARIES.values())} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
