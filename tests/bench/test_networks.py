"""The registry: known sizes, one step of every network, and anyone's own."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from torchlms.bench.networks import NETWORKS, NetworkOptions, get_network
from torchlms.bench.networks.torchvision_or_own import own, torchvision
from torchlms.bench.networks.user import any_loss
from torchlms.bench.options import BenchOptions, Way
from torchlms.bench.workload import make_workload
from torchlms.errors import BadOption

if TYPE_CHECKING:
    from pathlib import Path

CPU = torch.device("cpu")

PARAMETERS = {
    "alexnet": 61_100_840,
    "googlenet": 6_624_904,
    "resnet50": 25_557_032,
    "resnet152": 60_192_808,
    "vgg16": 138_357_544,
}
# The deep and wide ones differ from these in counts only: they run without data, on the meta device.
LARGE = ("resnet152", "vgg16")
TINY_EDGE = {"alexnet": 63, "mnist": 28, "unet3d": 16}


def tiny(name: str, dtype: torch.dtype = torch.float32) -> NetworkOptions:
    return NetworkOptions(
        batch_size=2,
        image_size=TINY_EDGE.get(name, 32),
        dtype=dtype,
        hidden=32,
        layers=2,
        heads=4,
        kv_heads=2,
        sequence=8,
        vocab=50,
        width=4,
    )


def count(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


@pytest.mark.parametrize("name", PARAMETERS)
def test_our_definitions_count_like_torchvision(name: str) -> None:
    with torch.device("meta"):
        assert count(own(name)) == PARAMETERS[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_our_definitions_have_torchvisions_structure(name: str) -> None:
    package = torchvision()
    if package is None:
        pytest.skip("torchvision does not import")
    options = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    with torch.device("meta"):
        theirs = getattr(package.models, name)(weights=None, **options)
        ours = own(name)
    shapes = [{key: tuple(t.shape) for key, t in m.state_dict().items()} for m in (ours, theirs)]
    assert shapes[0] == shapes[1]
    kinds = [
        sorted(type(m).__name__ for m in model.modules() if next(m.children(), None) is None)
        for model in (ours, theirs)
    ]
    assert kinds[0] == kinds[1]


def test_counts_of_the_other_networks() -> None:
    with torch.device("meta"):
        counts = {
            name: count(NETWORKS[name].factory(NetworkOptions(batch_size=1, image_size=edge)))  # type: ignore[arg-type]
            for name, edge in (("cifar10_full", 32), ("mnist", 28), ("llama", 0))
        }
    assert counts == {"cifar10_full": 89_578, "mnist": 3_274_634, "llama": 1_364_297_728}


@pytest.mark.parametrize("name", LARGE)
def test_one_step_of_the_large(name: str) -> None:
    with torch.device("meta"):
        model = own(name)
        scores = model(torch.empty(2, 3, 32, 32))
        NETWORKS[name].loss(scores, torch.zeros(2, dtype=torch.long)).backward()  # type: ignore[no-untyped-call]
    assert scores.shape == (2, 1000)
    assert all(weight.grad is not None for weight in model.parameters())


@pytest.mark.parametrize("name", [name for name in NETWORKS if name not in LARGE])
def test_one_step_of_each(name: str) -> None:
    network, options = NETWORKS[name], tiny(name)
    model, make_batch = network.build(options, CPU)
    inputs, target = make_batch(options, CPU, torch.Generator().manual_seed(1))
    loss = network.loss(model(inputs), target)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.dim() == 0
    assert torch.isfinite(loss)
    assert all(weight.grad is not None for weight in model.parameters())


@pytest.mark.parametrize("name", ["mnist", "llama", "unet3d"])
def test_bfloat16_is_a_cast_with_the_loss_in_float32(name: str) -> None:
    network, options = NETWORKS[name], tiny(name, torch.bfloat16)
    model, make_batch = network.build(options, CPU)
    inputs, target = make_batch(options, CPU, torch.Generator().manual_seed(1))
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert network.loss(model(inputs), target).dtype == torch.float32


@pytest.mark.parametrize("edge", [8192, 5000, 65])
def test_googlenet_takes_any_edge(edge: int) -> None:
    with torch.device("meta"):
        assert own("googlenet")(torch.empty(1, 3, edge, edge)).shape == (1, 1000)


def test_llama_does_not_look_ahead() -> None:
    options = tiny("llama")
    model, make_batch = NETWORKS["llama"].build(options, CPU)
    tokens, _ = make_batch(options, CPU, torch.Generator().manual_seed(1))
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % options.vocab
    torch.testing.assert_close(model(tokens)[:, :-1], model(changed)[:, :-1])


@pytest.mark.parametrize(
    ("change", "said"),
    [({"heads": 3}, "--heads 3"), ({"heads": 4, "kv_heads": 3}, "--kv-heads 3")],
)
def test_llama_refuses_heads_that_do_not_divide(change: dict[str, int], said: str) -> None:
    options = NetworkOptions(batch_size=1, image_size=0, hidden=32, layers=1, sequence=4, vocab=8, **change)  # type: ignore[arg-type]
    with pytest.raises(BadOption, match=said):
        NETWORKS["llama"].factory(options)


def test_unet_refuses_odd_edges_and_unknown_norms() -> None:
    with pytest.raises(BadOption, match="multiple of 8"):
        NETWORKS["unet3d"].factory(NetworkOptions(batch_size=1, image_size=20))
    with pytest.raises(BadOption, match="--norm layer"):
        NETWORKS["unet3d"].factory(NetworkOptions(batch_size=1, image_size=16, norm="layer"))


def test_unknown_model_lists_the_known() -> None:
    with pytest.raises(BadOption) as raised:
        get_network("resnet51")
    assert all(name in str(raised.value) for name in NETWORKS)
    assert "package.module:factory" in str(raised.value)


USER = """
import torch
from torch import nn

def images():
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 7))

def rows():
    def make_batch(options, device, generator):
        inputs = torch.randn(options.batch_size, 5, device=device, generator=generator)
        return inputs, inputs.sum(1, keepdim=True)
    return nn.Linear(5, 1), make_batch

def nothing():
    return 3

def three():
    return nn.Linear(5, 1), None, None

def batch_first():
    return nn.Linear(5, 1), 5

def unsuited():
    return nn.Linear(5, 1), lambda options, device, generator: ({"x": torch.ones(2, 3)}, [torch.ones(2), 1])

def failing():
    raise KeyError("no such file")

def untrained():
    return nn.ReLU()

def broken():
    def make_batch(options, device, generator):
        return [1, 2][options.batch_size], 0
    return nn.Linear(5, 1), make_batch

def nobatch():
    return nn.Linear(5, 1), lambda options, device, generator: None

def oneargument():
    return nn.Linear(5, 1), lambda options: None

def narrow():
    return nn.Linear(5, 1)

def needy(width):
    return nn.Linear(width, 1)

constant = 3
"""


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "their_networks.py").write_text(USER)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("their_networks", None)
    return "their_networks"


@pytest.mark.parametrize("factory", ["images", "rows"])
def test_a_users_own_network(user_module: str, factory: str) -> None:
    network = get_network(f"{user_module}:{factory}")
    options = NetworkOptions(batch_size=4, image_size=8)
    model, make_batch = network.build(options, CPU)
    inputs, target = make_batch(options, CPU, torch.Generator().manual_seed(1))
    network.loss(model(inputs), target).backward()  # type: ignore[no-untyped-call]
    assert all(weight.grad is not None for weight in model.parameters())


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("no_such_package:f", "cannot import"),
        (":missing", "no callable 'missing'$"),
        (":constant", "no callable"),
        (":image", "did you mean their_networks:images"),
    ],
)
def test_a_users_mistakes_are_named(user_module: str, spec: str, said: str) -> None:
    with pytest.raises(BadOption, match=said):
        get_network(user_module + spec if spec.startswith(":") else spec)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1 / 0", r"faulty failed as it was imported: ZeroDivisionError: .* \(faulty.py:1\)"),
        ("def f(:", "faulty failed as it was imported: SyntaxError"),
        ("import sys\nsys.exit(3)", r"faulty ends the program as it is imported \(SystemExit: 3\)"),
        ("import no_such_thing", "cannot import faulty: No module named 'no_such_thing'"),
    ],
)
def test_a_module_that_fails_as_it_is_imported(
    text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "faulty.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(BadOption, match=said):
        get_network("faulty:f")


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        ("nothing", "gave int; it gives a torch.nn.Module"),
        ("three", r"gave \(Linear, NoneType, NoneType\)"),
        ("batch_first", r"gave \(Linear, int\); .* make_batch\(options, device, generator\)"),
        ("needy", "without arguments, and that does not suit it .*'width'"),
        ("failing", r"the factory failed: KeyError: 'no such file' \(their_networks.py:\d+\)"),
        ("untrained", "the ReLU has no parameters to train"),
    ],
)
def test_a_factory_that_gives_something_else(user_module: str, factory: str, said: str) -> None:
    network = get_network(f"{user_module}:{factory}")
    with pytest.raises(BadOption, match=said):
        network.build(NetworkOptions(batch_size=1, image_size=8), CPU)


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        (
            "narrow",
            r"inputs \[4, 3, 8, 8\] and target \[4\]: RuntimeError: mat1 and mat2 shapes .*--image-size",
        ),
        ("unsuited", r"inputs x \[2, 3\] and target \[2\], int: TypeError: "),
    ],
)
def test_a_batch_that_does_not_suit_the_network(user_module: str, factory: str, said: str) -> None:
    network = get_network(f"{user_module}:{factory}")
    options = BenchOptions(
        model=network.name, batch_size=4, image_size=8, way=Way.NONE, device="cpu"
    ).resolve(network)
    workload = make_workload(network, options)
    with pytest.raises(BadOption, match=f"{factory}: its forward pass failed with {said}"):
        workload.step()


def test_an_error_of_a_network_of_ours_is_none_of_the_users() -> None:
    network = get_network("mnist")
    options = BenchOptions(model="mnist", batch_size=4, way=Way.NONE, device="cpu").resolve(network)
    workload = make_workload(network, options)
    workload.inputs = workload.inputs[:, :, :4]
    with pytest.raises(RuntimeError) as raised:
        workload.step()
    assert not isinstance(raised.value, BadOption)


def test_any_loss_takes_the_outputs_own() -> None:
    class Output:
        loss = torch.tensor(2.0)

    assert any_loss(Output(), None).item() == 2.0
    assert any_loss(torch.tensor(3.0), None).item() == 3.0
    assert any_loss(torch.zeros(2, 4, 5), torch.zeros(2, 4, dtype=torch.long)).item() == pytest.approx(
        1.6094, 1e-4
    )
