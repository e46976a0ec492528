"""Two gloo processes: joint batch statistics equal one process with the joint batch, and DDP trains the layer."""

import copy
import itertools
from pathlib import Path

import pytest
import timm.layers
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from l2bn import L2BatchNorm1d, L2BatchNorm2d, L2BatchNorm3d
from l2bn.norms.l2bn import L2BatchNormAct2d, convert
from l2bn.norms.sync import convert_sync

SHARES = 5, 7  # samples of the two ranks: unequal, so that means must be weighted
CASES = [
    *itertools.product(["bn", "unit", "rms"], ["off"], ["contiguous", "channels_last"]),
    ("unit", "on", "channels_last"),
]


def layer_of(kind: str, fused: str) -> nn.Module:
    torch.manual_seed(1)
    layer = nn.BatchNorm2d(4) if kind == "bn" else L2BatchNorm2d(4, scale=kind, fused=fused)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer


def joint_batch(layout: str) -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    x, g = torch.randn(2, sum(SHARES), 4, 5, 3) * torch.linspace(0.1, 5, sum(SHARES)).view(-1, 1, 1, 1)
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    return x.contiguous(memory_format=memory_format), g


def outcome(layer: nn.Module, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(g)
    state = {key: value.clone() for key, value in layer.state_dict().items() if "running" in key}
    return {"y": y.detach(), "x": x.grad, "weight": layer.weight.grad, "bias": layer.bias.grad, **state}


def small_net() -> nn.Module:
    torch.manual_seed(3)
    norms = (L2BatchNorm2d(4, fused="on"), L2BatchNorm2d(4, fused="off"))
    return nn.Sequential(nn.Conv2d(4, 4, 1), norms[0], nn.ReLU(), nn.Conv2d(4, 4, 1), norms[1])


def rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    results = {}
    for case in CASES:
        layer = layer_of(*case[:2])
        assert convert_sync(layer) == 1
        x, g = (t.split(SHARES)[rank] for t in joint_batch(case[2]))
        results[case] = outcome(layer, x, g)
    model = DistributedDataParallel(small_net())
    x, _ = joint_batch("contiguous")
    for _ in range(2):
        model.zero_grad()
        model(x[rank * 4 : rank * 4 + 4]).square().mean().backward()
    results["ddp"] = {name: p.grad for name, p in model.module.named_parameters()}
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(rank, (str(folder),), nprocs=2)
    return [torch.load(Path(folder, f"{r}.pt")) for r in range(2)]


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_joint_statistics_equal_one_process_with_the_joint_batch(ranks: list[dict], case: tuple) -> None:
    kind, _, layout = case
    expected = outcome(layer_of(kind, "off").double(), *(t.double() for t in joint_batch(layout)))
    first, second = (r[case] for r in ranks)
    for key, value in expected.items():
        if key in ("y", "x"):
            ours = torch.cat([first[key], second[key]])
        elif "running" in key:
            assert torch.equal(first[key], second[key]), f"the ranks disagree on {key}"
            ours = first[key]
        else:
            ours = first[key] + second[key]
        error = (ours.double() - value).norm() / value.norm()
        assert error < 2e-6, f"{key} is off by {error:.1e}"
    if layout == "channels_last":
        assert first["y"].is_contiguous(memory_format=torch.channels_last)


def test_ddp_averages_the_ranks_gradients(ranks: list[dict]) -> None:
    x, _ = joint_batch("contiguous")
    single = [small_net(), small_net()]
    for r, net in enumerate(single):
        net(x[r * 4 : r * 4 + 4]).square().mean().backward()
    for name, parameter in single[0].named_parameters():
        average = (parameter.grad + dict(single[1].named_parameters())[name].grad) / 2
        assert torch.equal(ranks[0]["ddp"][name], ranks[1]["ddp"][name])
        torch.testing.assert_close(ranks[0]["ddp"][name], average, rtol=1e-4, atol=1e-6)


def test_conversion_keeps_layers_and_names_and_changes_nothing_alone() -> None:
    torch.manual_seed(0)
    act = timm.layers.BatchNormAct2d(4)
    model = nn.Sequential(
        nn.Sequential(
            L2BatchNorm3d(4, fused="off"), nn.Flatten(3), act, convert(timm.layers.BatchNormAct2d(4), fused="off")
        ),
        nn.Sequential(nn.BatchNorm2d(4), L2BatchNorm2d(4, fused="off"), nn.Flatten(2), nn.BatchNorm1d(4)),
        nn.Sequential(L2BatchNorm1d(4, fused="off"), nn.Unflatten(2, (3, 2, 2)), nn.BatchNorm3d(4)),
    )
    x = torch.randn(6, 4, 3, 2, 2)
    plain = copy.deepcopy(model)
    layers, keys = list(model.modules()), list(model.state_dict())
    assert convert_sync(model) == 8
    assert convert_sync(model) == 0, "converted twice"
    assert all(a is b for a, b in zip(model.modules(), layers, strict=True))
    assert list(model.state_dict()) == keys
    assert isinstance(model[0][3], L2BatchNormAct2d)
    torch.testing.assert_close(model(x), plain(x))
    torch.testing.assert_close(copy.deepcopy(model).eval()(x), plain.eval()(x))


def test_a_layer_of_its_own_kind_is_refused() -> None:
    class Odd(nn.BatchNorm2d):
        pass

    model = nn.Sequential(nn.BatchNorm2d(3), Odd(3))
    with pytest.raises(TypeError, match=r"no synchronised form of .*Odd"):
        convert_sync(model)
    assert type(model[0]) is nn.BatchNorm2d
