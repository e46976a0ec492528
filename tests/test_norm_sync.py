"""Two gloo processes: joint batch statistics equal one process with the joint batch; DDP and FSDP2 train it."""

import copy
import itertools
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm.layers
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from l2bn import L2BatchNorm1d, L2BatchNorm2d, L2BatchNorm3d
from l2bn.kernels.compiler import select_kernels
from l2bn.norms import l2bn_position
from l2bn.norms.l2bn import L2BatchNormAct2d, convert
from l2bn.norms.l2bn_mean_norm import DivideByMeanNorm
from l2bn.norms.sync import convert_sync

SHARES = [(5, 7), (1, 11), (0, 12)]  # samples of the two ranks: unequal, so that means must be weighted
CASES = [
    *itertools.product(["bn", "unit", "rms"], ["off"], ["contiguous", "channels_last"], SHARES),
    ("unit", "on", "channels_last", (0, 12)),
    ("position", "off", "contiguous", (5, 7)),
]


def layer_of(kind: str, fused: str) -> nn.Module:
    torch.manual_seed(1)
    if kind == "position":
        layer = l2bn_position.convert(nn.BatchNorm2d(4))
    else:
        layer = nn.BatchNorm2d(4) if kind == "bn" else L2BatchNorm2d(4, scale=kind, fused=fused)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer


def joint_batch(layout: str) -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    x, g = torch.randn(2, 12, 4, 5, 3) * torch.linspace(0.1, 5, 12).view(-1, 1, 1, 1)
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    return x.contiguous(memory_format=memory_format), g


def outcome(layer: nn.Module, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(g)
    state = {key: value.clone() for key, value in layer.state_dict().items() if "running" in key}
    return {"y": y.detach(), "x": x.grad, "weight": layer.weight.grad, "bias": layer.bias.grad, **state}


def second_derivatives(layer: nn.Module, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    """Of a penalty on the gradient, as in R1 or in sharpness-aware training."""
    x = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad((layer(x).sin() * g).sum(), x, create_graph=True)
    dx.square().sum().backward()
    return {"x": x.grad, "weight": layer.weight.grad, "bias": layer.bias.grad}


REFUSED = [
    (nn.BatchNorm2d, {"num_features": 3, "eps": 0.0}),
    (L2BatchNorm2d, {"num_features": 3, "eps": 0.0}),
    (L2BatchNorm2d, {"num_features": 3, "eps": -1.0}),
    (L2BatchNorm2d, {"num_features": 1, "track_running_stats": False}),
    (nn.BatchNorm2d, {"num_features": 1, "track_running_stats": False}),
]


def refusal(cls: type[nn.Module], options: dict[str, object]) -> tuple[str, str]:
    """The errors of the layer alone and of its synchronised form."""
    layer, errors = cls(**options), []
    for _ in range(2):
        with pytest.raises((ValueError, RuntimeError)) as raised:
            layer(torch.randn(4, 3, 5, 5))
        errors.append(str(raised.value))
        convert_sync(layer)
    return errors[0], errors[1]


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
        x, g = (t.split(case[3])[rank] for t in joint_batch(case[2]))
        results[case] = outcome(layer, x, g)
    for kind, shares in itertools.product(["bn", "unit"], SHARES):
        layer = layer_of(kind, "off").double()
        convert_sync(layer)
        x, g = (t.double().split(shares)[rank] for t in joint_batch("contiguous"))
        results["second", kind, shares] = second_derivatives(layer, x, g)
    joint = layer_of("unit", "on")
    convert_sync(joint)
    results["kernels"] = select_kernels(joint, "cpu", 1_000_000), joint.fused
    positions = L2BatchNorm2d(4, fused="off")
    convert_sync(positions)
    results["one value a channel"] = positions(torch.randn(1, 4, 1, 1)).isfinite().all()
    with pytest.raises(ValueError, match="1 value per channel") as refused:
        positions(torch.randn(1 - rank, 4, 1, 1))
    results["one value in all"] = str(refused.value)
    step = DivideByMeanNorm(0.1)
    step(torch.zeros(0, 4, 5, 3) if rank == 0 else torch.ones(2, 4, 5, 3))  # a rank may be without samples
    step(joint_batch("contiguous")[0].split((5, 7))[rank])
    results["mean norm"] = step.running_norm
    step = DivideByMeanNorm(0.1).half()
    step(torch.full((300, 4, 5, 3), 40.0, dtype=torch.float16))  # norms of 310, whose sum exceeds float16
    results["mean norm in half precision"] = float(step.running_norm)
    results["refused"] = [refusal(*case) for case in REFUSED]
    model = DistributedDataParallel(small_net())
    x, _ = joint_batch("contiguous")
    for _ in range(2):
        model.zero_grad()
        model(x[rank * 4 : rank * 4 + 4]).square().mean().backward()
    results["ddp"] = {name: p.grad for name, p in model.module.named_parameters()}
    net = small_net()
    for part in (net[1], net[4], net):
        fully_shard(part, mesh=init_device_mesh("cpu", (2,)))
    for _ in range(2):
        net.zero_grad()
        net(x[rank * 4 : rank * 4 + 4]).square().mean().backward()
    results["fsdp"] = {name: p.grad.full_tensor() for name, p in net.named_parameters()}
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(rank, (str(folder),), nprocs=2)
    return [torch.load(Path(folder, f"{r}.pt")) for r in range(2)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_joint_statistics_equal_one_process_with_the_joint_batch(ranks: list[dict], case: tuple) -> None:
    kind, _, layout, shares = case
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
    if layout == "channels_last" and shares[0] > 0:
        assert first["y"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shares", SHARES, ids=str)
@pytest.mark.parametrize("kind", ["bn", "unit"])
def test_second_derivatives_equal_one_process_with_the_joint_batch(
    ranks: list[dict], kind: str, shares: tuple[int, int]
) -> None:
    layer = layer_of(kind, "off").double()
    expected = second_derivatives(layer, *(t.double() for t in joint_batch("contiguous")))
    first, second = (r["second", kind, shares] for r in ranks)
    torch.testing.assert_close(torch.cat([first["x"], second["x"]]), expected["x"])
    for name in ("weight", "bias"):
        torch.testing.assert_close(first[name] + second[name], expected[name])


def test_the_record_says_that_joint_layers_have_no_kernels(ranks: list[dict]) -> None:
    assert all(r["kernels"] == ("plain", "off") for r in ranks)


def test_one_value_a_channel_is_enough_where_other_ranks_have_values(ranks: list[dict]) -> None:
    assert all(r["one value a channel"] for r in ranks)


def test_one_value_on_all_ranks_together_is_refused(ranks: list[dict]) -> None:
    assert all("got 1 on all ranks together" in results["one value in all"] for results in ranks)


def test_the_mean_norm_is_that_of_all_ranks(ranks: list[dict]) -> None:
    """Unlike running statistics it is used in training, so that it must not depend on the rank."""
    step = DivideByMeanNorm(0.1)
    step(torch.ones(2, 4, 5, 3))
    step(joint_batch("contiguous")[0])
    assert torch.equal(ranks[0]["mean norm"], ranks[1]["mean norm"])
    torch.testing.assert_close(ranks[0]["mean norm"], step.running_norm)
    assert ranks[0]["mean norm in half precision"] == pytest.approx(40 * 60**0.5, rel=1e-3)


def test_what_the_layer_refuses_its_synchronised_form_refuses(ranks: list[dict]) -> None:
    for alone, joint in ranks[0]["refused"]:
        assert joint == alone


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_data_parallel_training_averages_the_ranks_gradients(ranks: list[dict], kind: str) -> None:
    x, _ = joint_batch("contiguous")
    single = [small_net(), small_net()]
    for r, net in enumerate(single):
        net(x[r * 4 : r * 4 + 4]).square().mean().backward()
    for name, parameter in single[0].named_parameters():
        average = (parameter.grad + dict(single[1].named_parameters())[name].grad) / 2
        assert torch.equal(ranks[0][kind][name], ranks[1][kind][name])
        torch.testing.assert_close(ranks[0][kind][name], average, rtol=1e-4, atol=1e-6)


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
    group: Any = object()
    assert convert_sync(model, group) == 0, "converted twice"
    assert all(m.joint.group is group for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    assert convert_sync(model) == 0
    assert all(a is b for a, b in zip(model.modules(), layers, strict=True))
    assert list(model.state_dict()) == keys
    assert isinstance(model[0][3], L2BatchNormAct2d)
    torch.testing.assert_close(model(x), plain(x))
    torch.testing.assert_close(copy.deepcopy(model).eval()(x), plain.eval()(x))
    torch.testing.assert_close(torch.fx.symbolic_trace(model.eval())(x), plain(x))
    torch.testing.assert_close(pickle.loads(pickle.dumps(model[0][2]))(x.flatten(3)), act(x.flatten(3)))
    frozen = timm.layers.freeze_batch_norm_2d(nn.Sequential(act.eval()))
    torch.testing.assert_close(frozen(x.flatten(3)), act(x.flatten(3)))


def test_a_layer_of_its_own_kind_is_refused() -> None:
    class Odd(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - BN's own name
            return 2 * super().forward(input)

    model = nn.Sequential(nn.BatchNorm2d(3), Odd(3))
    with pytest.raises(TypeError, match=r"no synchronised form: .*Odd"):
        convert_sync(model)
    assert type(model[0]) is nn.BatchNorm2d

    class Own(L2BatchNorm2d):
        def _normalized(self, x: torch.Tensor, state: Any) -> torch.Tensor:
            return x

    with pytest.raises(TypeError, match=r"no synchronised form: .*Own"):
        convert_sync(nn.Sequential(Own(2)))
