"""Scripts that train, under ``torchlms run`` on the CPU: the same output, within the budget."""

from __future__ import annotations

import contextlib
import csv
import functools
import json
import os
import pty
import re
import tempfile
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests import forked
from tests.forked import Ended
from tests.runner.runs import ENVIRONMENT, EXAMPLES, both, forked_both, forked_plainly, forked_under_lms
from torchlms.core.tape import Kind, Tape

pytest.importorskip("typer")

# What every script below begins with. Some 10 MB are needed by `net`, most of it for activations.
HEAD = """
import sys, torch
from torch import nn
torch.manual_seed(1)
def make(width=64, depth=12):
    return nn.Sequential(*[layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.Tanh())])
def step(net, optimizer, rows=1024):
    loss = net(torch.randn(rows, 64)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(loss.item().hex(), flush=True)
net = make()
optimizer = torch.optim.Adam(net.parameters())
"""
BUDGET = "--budget=3MiB"
USUAL = "for _ in range(6): step(net, optimizer)"


def write(tmp_path: Path, body: str, head: str = HEAD) -> str:
    (tmp_path / "train.py").write_text(head + textwrap.dedent(body))
    return "train.py"


@functools.cache
def plain_run(text: str) -> Ended:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "train.py").write_text(text)
        return forked_plainly("train.py", cwd=Path(folder))


def figures(tmp_path: Path, script: str, *options: str) -> dict[str, Any]:
    """Of a run under LMS that prints what the plain run prints."""
    plain = plain_run((tmp_path / script).read_text())
    ours = forked_under_lms(BUDGET, "--json=figures.json", *options, script, cwd=tmp_path)
    assert (ours.status, ours.out) == (plain.status, plain.out), ours.err
    found: dict[str, Any] = json.loads((tmp_path / "figures.json").read_text())
    return found | {"said": ours.err}


def more(case: str) -> Any:
    return pytest.param(case, marks=pytest.mark.more)


def slow(case: str) -> Any:
    return pytest.param(case, marks=pytest.mark.slow)


# -- the examples ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "budget"),
    [
        pytest.param(["digits.py", "--epochs=1"], 52 << 20, marks=pytest.mark.more),
        pytest.param(["language_model.py", "--steps=5"], 30 << 20, marks=pytest.mark.more),
        (["images.py", "--workers=1", "--start-method=fork"], 15 << 20),
        pytest.param(["images.py", "--workers=1", "--start-method=spawn"], 15 << 20, marks=pytest.mark.more),
    ],
)
def test_examples(arguments: list[str], budget: int, tmp_path: Path) -> None:
    command = [str(EXAMPLES / arguments[0]), *arguments[1:]]
    plain = forked_plainly(*command, cwd=tmp_path)
    ours = forked_under_lms(f"--budget={budget}", "--json=figures.json", *command, cwd=tmp_path)
    assert (ours.status, ours.out) == (0, plain.out), ours.err
    found = json.loads((tmp_path / "figures.json").read_text())
    assert found["state"] in ("guard", "record"), "the last batch of an epoch is smaller and planned apart"
    assert found["bytes_out_per_step"] > 0
    assert found["peak_device_bytes"] <= budget


@pytest.mark.more
def test_a_script_that_reads_its_text_from_a_pipe(tmp_path: Path) -> None:
    text = "to be or not to be, that is the question; " * 10
    script = str(EXAMPLES / "language_model.py")
    plain, ours = forked_both(script, "--text=-", "--steps=2", cwd=tmp_path, stdin=text)
    assert ours.out == plain.out


# -- what is found ---------------------------------------------------------------------------


def test_model_and_optimizer_are_found(tmp_path: Path) -> None:
    found = figures(tmp_path, write(tmp_path, USUAL), "--save-tape=tape.json", "--report")
    assert (found["state"], found["record_steps"], found["ended_by"]) == ("guard", 1, None)
    assert found["bytes_out_per_step"] > 0
    assert found["peak_device_bytes"] <= 3 << 20
    tape = Tape.load(tmp_path / "tape.json")
    assert {op.module for op in tape.ops} >= {"0", "1", "23"}, "by the names that they have in the model"
    kinds = [value.kind for value in tape.values]
    assert kinds.count(Kind.PARAMETER) == 24
    assert Kind.STATE in kinds
    assert "LMS was on, following a plan; 6 steps" in found["said"]
    assert "made by" in found["said"]
    assert "recording step 1 on cpu, budget 3.0 MiB" in found["said"]


@pytest.mark.more
def test_two_models_and_two_optimizers(tmp_path: Path) -> None:
    body = """
        class Generator(nn.Sequential): pass
        class Critic(nn.Sequential): pass
        generator = Generator(nn.Linear(32, 64), make())
        critic = Critic(make(), nn.Linear(64, 1))
        optimizers = [torch.optim.Adam(model.parameters(), 1e-3) for model in (critic, generator)]
        for _ in range(8):
            noise = torch.randn(1024, 32)
            with torch.no_grad():
                made = generator(noise)
            loss = critic(made).mean() - critic(torch.randn(1024, 64)).mean()
            loss.backward()
            optimizers[0].step()
            optimizers[0].zero_grad()
            gain = -critic(generator(noise)).mean()
            gain.backward()
            optimizers[1].step()
            for optimizer in optimizers:
                optimizer.zero_grad()
            print(loss.item().hex(), gain.item().hex())
        print(nn.modules.module._global_forward_pre_hooks, "are gone after a round")
    """
    found = figures(tmp_path, write(tmp_path, body), "--save-tape=tape.json", "--budget=4MiB")
    assert found["peak_device_bytes"] <= 4 << 20
    tape = Tape.load(tmp_path / "tape.json")
    assert any(op.module.startswith("Generator.1.") for op in tape.ops)
    assert any(op.module.startswith("0.") for op in tape.ops)


@pytest.mark.more
def test_a_model_is_not_kept_alive(tmp_path: Path) -> None:
    body = """
        import gc, weakref
        for fold in range(2):
            net = make()
            optimizer = torch.optim.SGD(net.parameters(), 0.1)
            for _ in range(4):
                step(net, optimizer)
            watched = weakref.ref(net), weakref.ref(net[0].weight), weakref.ref(optimizer)
            del net, optimizer
            gc.collect()
            print([item() for item in watched])
    """
    assert figures(tmp_path, write(tmp_path, body))["state"] == "guard"


@pytest.mark.more
def test_parameters_without_a_module(tmp_path: Path) -> None:
    body = """
        weights = [torch.randn(64, 64, requires_grad=True) for _ in range(12)]
        optimizer = torch.optim.SGD(weights, 0.1)
        def run(x):
            for weight in weights:
                x = (x @ weight / 8).tanh()
            return x
        for _ in range(6): step(run, optimizer)
    """
    found = figures(tmp_path, write(tmp_path, body))
    assert found["state"] == "guard"
    assert found["steps"] == 5, "all but the first, in which nothing told of a training step"


@pytest.mark.more
def test_other_modules_do_not_count(tmp_path: Path) -> None:
    """A preprocessing module in front, a frozen network and an evaluation before the first step."""
    body = """
        frozen = make().requires_grad_(False)
        with torch.no_grad():
            net(torch.randn(4, 64))
        nn.Flatten()(frozen(torch.randn(4, 8, 8).flatten(1)))
        print("now", file=sys.stderr, flush=True)
        for _ in range(5): step(net, optimizer)
    """
    said = figures(tmp_path, write(tmp_path, body))["said"]
    assert said.index("now") < said.index("recording step 1")


@pytest.mark.more
def test_forward_called_by_its_name(tmp_path: Path) -> None:
    body = "for _ in range(5): step(net.forward, optimizer)"
    figures(tmp_path, write(tmp_path, body), "--save-tape=tape.json")
    assert {"0", "1", "23"} <= {op.module for op in Tape.load(tmp_path / "tape.json").ops}


@pytest.mark.more
@pytest.mark.parametrize(
    "whole", ["net = torch.compile(net, backend='aot_eager')", "net.compile(backend='eager')"]
)
def test_a_compiled_model(whole: str, tmp_path: Path) -> None:
    script = write(tmp_path, f"{whole}\n{USUAL}\n")
    plain, ours = forked_both(script, cwd=tmp_path)
    assert ours == plain, "and no warning of global hooks"


@pytest.mark.more
def test_a_compiled_step_in_one_graph(tmp_path: Path) -> None:
    body = """
        graphs = []
        def backend(graph, inputs):
            graphs.append(graph)
            return graph.forward
        @torch.compile(backend=backend, fullgraph=True)
        def run(x):
            return net(x).sin()
        for _ in range(6): step(run, optimizer)
        print(len(graphs), file=sys.stderr)
    """
    plain, ours = forked_both(write(tmp_path, body), cwd=tmp_path)
    assert (ours.status, ours.out) == (plain.status, plain.out), ours.err


@pytest.mark.more
def test_modes_of_the_script_are_waited_for(tmp_path: Path) -> None:
    """LMS put on within them would be taken off in their place."""
    body = """
        for _ in range(2):
            with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
                step(net, optimizer)
        for _ in range(5): step(net, optimizer)
    """
    assert figures(tmp_path, write(tmp_path, body))["steps"] == 5


# -- the script's own LMS --------------------------------------------------------------------

OWN = "the script uses torchlms itself: its settings hold, those of `torchlms run` do not"


@pytest.mark.parametrize("before", ["", more("step(net, optimizer)\n")])
def test_the_scripts_own_lms_wins(before: str, tmp_path: Path) -> None:
    body = f"""
        import torchlms
        {before}
        with torchlms.LMS(net, optimizer, budget="5MiB") as lms:
            for _ in range(5): step(net, optimizer)
        for _ in range(2): step(net, optimizer)
        print(lms.stats()["budget_bytes"])
    """
    found = figures(tmp_path, write(tmp_path, textwrap.dedent(body)))
    assert found["said"].count(OWN) == 1
    assert found["state"] == "off"
    assert "LMS was never on" not in found["said"]


@pytest.mark.more
def test_the_script_switches_lms_off(tmp_path: Path) -> None:
    body = (
        "import torchlms\nstep(net, optimizer)\ntorchlms.disable()\nfor _ in range(3): step(net, optimizer)"
    )
    assert OWN in figures(tmp_path, write(tmp_path, body))["said"]


# -- when it goes wrong ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        "net(torch.randn(4, 64)).sum().backward()\nnet(torch.randn(4, 65))",
        slow(
            "class Bad(nn.Module):\n  def forward(self, x):\n    return net(x) @ x\nBad()(torch.randn(3, 64))"
        ),
        slow("y = net(torch.randn(4, 64))\ny.sum().backward()\ny.sum().backward()"),
        slow("step(net, optimizer)\nraise SystemExit(9)"),
        slow("step(net, optimizer)\nraise KeyboardInterrupt"),
        more(
            "step(net, optimizer)\nimport os, signal\nos.kill(os.getpid(), signal.SIGINT)\n"
            "step(net, optimizer)"
        ),
        more("step(net, optimizer)\nimport os\nos._exit(3)"),
    ],
)
def test_the_same_traceback_and_status(body: str, tmp_path: Path) -> None:
    plain, ours = both(write(tmp_path, body), cwd=tmp_path)
    assert (ours.status, ours.out) == (plain.status, plain.out)
    # Where hooks are, torch calls a module by way of one more function of its own.
    own = re.compile(r'  File ".*/torch/nn/modules/module.py".*\n    .*\n( +[~^]+\n)?')
    assert own.sub("", ours.err) == own.sub("", plain.err)


def test_a_budget_that_is_too_small(tmp_path: Path) -> None:
    ours = forked_under_lms("--budget=500KiB", "--json=f.json", write(tmp_path, USUAL), cwd=tmp_path)
    assert ours.status == 1
    assert json.loads((tmp_path / "f.json").read_text())["ended_by"] == "BudgetTooSmall"
    assert "torchlms.errors.BudgetTooSmall: aten." in ours.err
    assert "train.py" in ours.err
    assert "torchlms/eager" not in ours.err


@pytest.mark.more
def test_lms_that_cannot_be_put_on(tmp_path: Path) -> None:
    """The error comes from within the script; it is one line all the same, and not the script's to catch."""
    body = "try:\n    step(net, optimizer)\nexcept Exception:\n    print('caught')"
    (tmp_path / "plan.json").write_text("{}")
    ours = forked_under_lms("--plan=plan.json", write(tmp_path, body), cwd=tmp_path)
    assert (ours.status, ours.out) == (2, "")
    assert ours.err.startswith("torchlms: ")
    assert len(ours.err.splitlines()) == 1


def test_running_out_of_memory_all_the_same(tmp_path: Path) -> None:
    script = write(tmp_path, "step(net, optimizer)\nraise MemoryError")
    ours = forked_under_lms("--quiet", script, cwd=tmp_path)
    assert ours.status == 1
    advice = ours.err.splitlines()[-1]
    assert advice.startswith("torchlms: memory ran out although LMS was on, for 1 steps")
    script = write(tmp_path, "torch.empty(1 << 60)")
    ours = forked_under_lms("--quiet", script, cwd=tmp_path)
    assert ours.err.splitlines()[-1].startswith("torchlms: memory ran out before LMS was on")


@pytest.mark.more
def test_another_device_than_asked_for(tmp_path: Path) -> None:
    found = figures(tmp_path, write(tmp_path, USUAL), "--device=cuda")
    assert "was seen in this process's main thread on cuda" in found["said"]
    assert "--device cuda: torch sees 0 CUDA devices" in found["said"]


# -- plans and processes ---------------------------------------------------------------------


@pytest.mark.more
def test_a_plan_is_kept_and_used_again(tmp_path: Path) -> None:
    script = write(tmp_path, USUAL)
    figures(tmp_path, script, "--save-plan=plan.json")
    found = figures(tmp_path, script, "--plan=plan.json")
    assert found["bytes_out_per_step"] > 0
    assert found["plan_s"] == json.loads((tmp_path / "plan.json").read_text())["plan_s"]


@pytest.mark.more
def test_recomputing(tmp_path: Path) -> None:
    body = """
        net = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Sigmoid()) for _ in range(8)])
        for _ in range(2): step(net, optimizer)
    """
    for options in (["--no-recompute"], []):
        figures(tmp_path, write(tmp_path, body), "--save-tape=tape.json", *options)
        tape = Tape.load(tmp_path / "tape.json")
        assert any(value.recipe for value in tape.values) == (not options)


@pytest.mark.more
def test_forks_are_left_alone(tmp_path: Path) -> None:
    """A child neither starts LMS nor reports, whether it was forked before LMS was on or after."""
    body = """
        import os
        def fork():
            child = os.fork()
            if child:
                print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
            return child == 0
        if fork():
            step(net, optimizer)
            raise SystemExit(1)
        for _ in range(4): step(net, optimizer)
        if fork():
            step(net, optimizer)
        else:
            step(net, optimizer)
    """
    found = figures(tmp_path, write(tmp_path, body), "--report")
    assert found["steps"] == 5
    assert found["said"].count("following a plan") == 1


@pytest.mark.more
def test_other_threads_are_left_alone(tmp_path: Path) -> None:
    body = """
        import threading
        thread = threading.Thread(target=step, args=(net, optimizer))
        thread.start()
        thread.join()
    """
    assert figures(tmp_path, write(tmp_path, body))["steps"] == 0


def test_quiet(tmp_path: Path) -> None:
    ours = forked_under_lms("--quiet", BUDGET, write(tmp_path, USUAL), cwd=tmp_path)
    assert (ours.status, ours.err) == (0, "")


# -- options of LMS --------------------------------------------------------------------------


def test_rules_hold(tmp_path: Path) -> None:
    script = write(tmp_path, USUAL)
    roomy = "--budget=80MiB"
    assert figures(tmp_path, script, roomy)["plan"]["disk"]["values"] == 0
    assert figures(tmp_path, script, roomy, "--rule=move_ops=aten.tanh*")["plan"]["disk"]["values"] == 12


def test_figures_alone_on_standard_output(tmp_path: Path) -> None:
    """Also where a child of the script prints."""
    script = write(tmp_path, f"import os\n{USUAL}\nos.system('echo child')")
    ours = forked_under_lms(BUDGET, "--json=-", script, cwd=tmp_path)
    assert json.loads(ours.out)["steps"] == 6
    assert "child" in ours.err
    assert plain_run((tmp_path / script).read_text()).out.split()[0] in ours.err
    assert not (tmp_path / "-").exists()


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="this system has no such device")
def test_a_full_disk_for_notes_does_not_end_the_script(tmp_path: Path) -> None:
    found = figures(tmp_path, write(tmp_path, USUAL), "--csv=/dev/full")
    assert found["said"].count("/dev/full ends here, training goes on: No space left on device") == 1
    assert found["averages"]["steps"] == 1


@pytest.mark.more
def test_steps_are_noted(tmp_path: Path) -> None:
    """A row a lap, also where two optimizers step in each; a trace of some; averages without the first."""
    body = """
        other = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1)
        for _ in range(8):
            step(net, optimizer)
            other.step()
    """
    script = write(tmp_path, body)
    notes = [
        "--csv=steps.csv",
        "--skip=5",
        "--batch-size=1024",
        "--profile=trace.json",
        "--profile-steps=3-4",
    ]
    found = figures(tmp_path, script, *notes)
    rows = list(csv.DictReader((tmp_path / "steps.csv").open()))
    assert [row["step"] for row in rows] == [str(number) for number in range(8)]
    seconds = [float(row["seconds"]) for row in rows[5:]]
    assert found["averages"]["steps"] == 3
    assert found["averages"]["seconds"] == pytest.approx(sum(seconds) / 3)
    assert float(rows[6]["items_per_s"]) == pytest.approx(1024 / seconds[1])
    assert "after the first 5 steps: 3 steps of the optimizer, " in found["said"]
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    steps = [event for event in events if str(event.get("name")).startswith("Optimizer.step#Adam")]
    assert len(steps) == 2


@pytest.mark.parametrize(
    ("option", "shown"),
    [("--log=debug", 3), ("--log=info", 2), ("--log=warning", 1), ("--log=error", 0), ("--log=off", 0)],
)
def test_the_log_has_levels(option: str, shown: int, tmp_path: Path) -> None:
    body = """
        import logging
        step(net, optimizer)
        for level in ("debug", "info", "warning"):
            getattr(logging.getLogger("torchlms"), level)("%s it is", level)
    """
    ours = forked_under_lms(option, write(tmp_path, body), cwd=tmp_path)
    assert ours.err.count(" it is") == shown
    assert ("recording step 1" in ours.err) is (shown > 1)


def test_a_level_in_the_environment_that_is_none(tmp_path: Path) -> None:
    environment = {**ENVIRONMENT, "TORCHLMS_LOG": "loud"}
    words = ["torchlms", "run", write(tmp_path, "step(net, optimizer)")]
    ours = forked.run(*words, cwd=tmp_path, environment=environment)
    assert ours.status == 0, ours.err
    assert ours.err.count("TORCHLMS_LOG=loud is no level: choose from debug, info") == 1
    assert "recording step 1" in ours.err


def test_a_level_that_is_none(tmp_path: Path) -> None:
    ours = forked_under_lms("--log=loud", write(tmp_path, ""), cwd=tmp_path)
    assert (ours.status, ours.err) == (
        2, "torchlms: --log loud: choose from debug, info, warning, error, off\n"
    )  # fmt: skip


@pytest.mark.more
def test_bits_are_checked(tmp_path: Path) -> None:
    script = write(tmp_path, USUAL)
    assert figures(tmp_path, script)["verified_values"] == 0
    assert figures(tmp_path, script, "--verify")["verified_values"] > 0
    assert figures(tmp_path, script, "--verify-every=1")["verified_values"] > 0


TORN = """
    class Torn(torch.optim.SGD):
        @torch.no_grad()
        def step(self):
            for parameter in self.param_groups[0]["params"]:
                parameter.add_(1)
            torch.empty(1 << 30).add_(1)
    optimizer = Torn(net.parameters(), 0.1)
    before = [parameter.clone() for parameter in net.parameters()]
    try:
        step(net, optimizer)
    except Exception as error:
        print(type(error).__name__, getattr(error, "restored", None))
    print(all(torch.equal(*pair) for pair in zip(before, net.parameters())))
"""


@pytest.mark.parametrize(("options", "said"), [(["--snapshot"], "True\nTrue"), ([], "False\nFalse")])
def test_a_torn_step_is_undone(options: list[str], said: str, tmp_path: Path) -> None:
    ours = forked_under_lms(BUDGET, *options, write(tmp_path, TORN), cwd=tmp_path)
    assert ours.out.endswith(f"StepTorn {said}\n"), ours.err


@pytest.mark.more
def test_an_optimizer_around_another(tmp_path: Path) -> None:
    body = """
        class Outer(torch.optim.Optimizer):
            def __init__(self, inner):
                super().__init__([p for g in inner.param_groups for p in g["params"]], {})
                self.inner = inner
            def step(self):
                self.inner.step()
                for parameter in self.param_groups[0]["params"]:
                    parameter.data.mul_(0.999)
        optimizer = Outer(optimizer)
        for _ in range(6): step(net, optimizer)
    """
    found = figures(tmp_path, write(tmp_path, body), "--snapshot")
    assert (found["state"], found["steps"]) == ("guard", 6)


def test_a_live_line_on_a_terminal(tmp_path: Path) -> None:
    """On standard error only, gone at the end; without the option, or a terminal, there is none."""
    body = """
        import time
        from pathlib import Path
        net.register_forward_hook(lambda *_: time.sleep(0.3 * Path("slowly").exists()))
        for _ in range(6): step(net, optimizer)
    """
    script = write(tmp_path, body)
    plain = forked_plainly(script, cwd=tmp_path)
    for options, shown in ((["--live", "--batch-size=1024"], True), ([], False)):
        if shown:
            (tmp_path / "slowly").touch()
        out, error = on_a_terminal("--quiet", BUDGET, *options, script, cwd=tmp_path)
        assert out == plain.out
        assert ("torchlms: recording, which is slow, step 1" in error) is shown
        assert ("items/s" in error) is shown
        assert error.endswith("\x1b[2K") is shown
        (tmp_path / "slowly").unlink(missing_ok=True)
    assert forked_under_lms("--quiet", "--live", BUDGET, script, cwd=tmp_path) == plain


def on_a_terminal(*arguments: str, cwd: Path) -> tuple[str, str]:
    """What is said on standard output, a file, and on standard error, a terminal."""
    ours, theirs = pty.openpty()
    environment = ENVIRONMENT | {"TERM": "xterm", "COLUMNS": "160"}
    with open(os.devnull) as given, tempfile.TemporaryFile() as out, ThreadPoolExecutor(1) as reader:
        said = reader.submit(all_that_is_said, ours)
        files = given.fileno(), out.fileno(), theirs
        forked.run_with(files, "torchlms", "run", *arguments, cwd=cwd, environment=environment)
        os.close(theirs)
        out.seek(0)
        return out.read().decode(), said.result().decode()


def all_that_is_said(terminal: int) -> bytes:
    said = b""
    with contextlib.suppress(OSError):  # how a terminal says that nobody is left
        while part := os.read(terminal, 4096):
            said += part
    os.close(terminal)
    return said
