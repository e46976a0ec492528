"""Speed changes no result: the trainer and the plain loop, step by step on the same batches.

The plain loop is the one of most repositories: it indexes, pads and crops an image at a time, computes in
contiguous memory and updates one parameter after the other. In float64 both must agree over 20 steps to many
digits. In float32 rounding grows with every step (a ReLU switches, and the paths part), so that a low learning rate
has to keep it small there.
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor, nn

from l2bn.backbones.resnet import cifar_resnet
from l2bn.benchmarks import workload
from l2bn.data.augment import CropFlip
from l2bn.data.loader import training_loader
from l2bn.data.splits import Images, Splits
from l2bn.norms.l2bn import convert
from l2bn.norms.swap import swap_norm
from l2bn.records import Fingerprint
from l2bn.seeding import generator
from l2bn.training.acceleration import prepare
from l2bn.training.compute import Compute
from l2bn.training.loop import DelayedMin, Position, Trainer
from l2bn.training.optim import Cosine, Recipe

STEPS, BATCH, SIZE, SEED, EPOCH, EPOCHS = 20, 8, 12, 0, 1, 3
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def splits() -> Splits:
    random = torch.Generator().manual_seed(5)
    images = torch.randint(0, 256, (STEPS * BATCH, 3, SIZE, SIZE), dtype=torch.uint8, generator=random)
    split = Images(images, torch.randint(10, (len(images),), generator=random))
    return Splits(
        split, split, 10, SIZE, MEAN, STD, CropFlip(2), "noise", None, Fingerprint(files="noise", pixels=None)
    )


def small_net() -> nn.Module:
    """What a compiler needs few seconds for."""
    first = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)]
    second = [nn.Conv2d(8, 20, 3, stride=2), nn.BatchNorm2d(20), nn.ReLU(inplace=True)]
    return nn.Sequential(*first, *second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(20, 10))


class Net(nn.Module):
    """A network with one of the norms, computing in one type; L2BN by fused kernels or as it is defined."""

    def __init__(self, norm: str, dtype: torch.dtype, small: bool = False, *, fused: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = small_net() if small else cifar_resnet(10, 20)
        if norm == "l2bn":
            swap_norm(self.body, lambda bn: convert(bn, fused="on" if fused else "off"))
        self.body.to(dtype)
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.to(self.dtype))


def recipe(lr: float) -> Recipe:
    return replace(workload.recipe(BATCH, EPOCHS, lr), schedule=Cosine())


def compute(device: str = "cpu", **options: Any) -> Compute:
    return workload.compute(**{"device": device, "threads": 1, "workers": 0, **options})


class Losses(Trainer):
    """A trainer that keeps each loss."""

    seen: list[Tensor]

    def forward(self, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        loss, *others = super().forward(*arguments)
        self.seen.append(loss.detach().double())
        return loss, *others


def trainer(
    fabric: Fabric,
    placing: Compute,
    net: Net,
    lr: float,
    after_step: Callable[[Position], float] = lambda _: 0.0,
) -> Losses:
    data = splits()
    loader = training_loader(
        data.train,
        splits=data,
        batch_size=BATCH,
        seed=SEED,
        device=fabric.device,
        rank=fabric.global_rank,
        world_size=fabric.world_size,
        channels_last=placing.channels_last,
    )
    prepared = prepare(net, placing, fabric.device, updates=STEPS)
    model, optimizer = fabric.setup(prepared.trained, recipe(lr).optimizer(prepared.network))
    made = Losses(
        fabric=fabric,
        model=model,
        network=prepared.network,
        optimizer=optimizer,
        recipe=recipe(lr),
        train=loader,
        test=loader.epoch,
        classes=10,
        seed=SEED,
        after_step=after_step,
        after_epoch=lambda _: None,
    )
    object.__setattr__(made, "seen", [])
    return made


def of_the_trainer(net: Net, lr: float, **options: Any) -> Tensor:
    placing = compute(**options)
    placing.set_up()
    made = trainer(placing.fabric(), placing, net, lr)
    made.train_epoch(Position(epoch=EPOCH))
    return torch.stack(made.seen).cpu()


def plain_batches() -> Iterator[tuple[Tensor, Tensor]]:
    """An image at a time, by the order and the numbers that belong to the seed and the epoch."""
    data = splits()
    assert isinstance(data.train, Images)
    assert isinstance(data.augmentation, CropFlip)
    padding = data.augmentation.padding
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    order = torch.randperm(len(data.train), generator=generator(SEED, "permutation", EPOCH))
    for step, indices in enumerate(order.split(BATCH)):
        numbers = data.augmentation.draw(BATCH, generator(SEED, "augmentation", EPOCH, step))
        images = []
        for index, (row, column, mirror) in zip(indices.tolist(), numbers.tolist(), strict=True):
            padded = F.pad(data.train.images[index], [padding] * 4)
            window = padded[:, row : row + SIZE, column : column + SIZE]
            images.append(window.flip(2) if mirror else window)
        # (x / 255 - mean) / std, rounded as the loader rounds it; test_data_loader.py has it in float64.
        yield torch.stack(images) * (1 / (255 * std)) + (-mean / std), data.train.labels[indices]


def of_the_plain_loop(net: Net, lr: float) -> Tensor:
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), lr, 0.9, weight_decay=5e-4, nesterov=True, foreach=False)
    losses = []
    for step, (images, labels) in enumerate(plain_batches()):
        for group in optimizer.param_groups:
            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * (EPOCH + step / STEPS) / EPOCHS))
        loss = F.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().double())
    return torch.stack(losses)


@pytest.mark.parametrize("norm", ["bn", "l2bn"])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.slow
def test_in_float64_the_losses_are_those_of_the_plain_loop(norm: str, channels_last: bool) -> None:
    fast = of_the_trainer(Net(norm, torch.float64, fused=True), 0.05, channels_last=channels_last)
    plain = of_the_plain_loop(Net(norm, torch.float64), 0.05)
    assert len(fast) == STEPS
    assert plain[-1] != plain[0]
    torch.testing.assert_close(fast, plain, rtol=1e-8, atol=0)


@pytest.mark.parametrize("norm", ["bn", "l2bn"])
@pytest.mark.parametrize("channels_last", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_in_float32_the_losses_are_those_of_the_plain_loop(norm: str, channels_last: bool) -> None:
    fast = of_the_trainer(Net(norm, torch.float32, fused=True), 1e-3, channels_last=channels_last)
    plain = of_the_plain_loop(Net(norm, torch.float32), 1e-3)
    torch.testing.assert_close(fast[:3], plain[:3], rtol=1e-5, atol=0)
    torch.testing.assert_close(fast, plain, rtol=2e-2, atol=0)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("norm", ["bn", "l2bn"])
def test_in_bfloat16_the_losses_are_near_those_of_the_plain_loop(norm: str, compiled: bool) -> None:
    """With a strided depthwise convolution, which stays in float32 on a CPU."""
    nets = [Net(norm, torch.float32, small=True, fused=fused) for fused in (True, False)]
    for net in nets:
        assert isinstance(net.body, nn.Sequential)
        torch.manual_seed(1)
        net.body.insert(3, nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8))
    fast = of_the_trainer(nets[0], 1e-2, precision="bf16-mixed", compile=compiled)
    plain = of_the_plain_loop(nets[1], 1e-2)
    assert not torch.equal(fast.float(), plain.float())
    torch.testing.assert_close(fast, plain, rtol=2e-2, atol=0)


@pytest.mark.parametrize(
    ("norm", "small"),
    [("bn", True), ("l2bn", True), *(pytest.param(norm, False, marks=pytest.mark.slow) for norm in ("bn", "l2bn"))],
)
def test_a_compiled_network_has_the_losses_of_the_plain_loop(norm: str, small: bool) -> None:
    fast = of_the_trainer(Net(norm, torch.float64, small, fused=True), 0.05, compile=True)
    plain = of_the_plain_loop(Net(norm, torch.float64, small), 0.05)
    torch.testing.assert_close(fast, plain, rtol=1e-8, atol=0)


def on_two_devices(fabric: Fabric, folder: Path) -> None:
    placing = compute(devices=2, sync_bn=True)
    placing.set_up()
    minimum = DelayedMin()
    answers = [minimum(torch.tensor(float(10 * call + fabric.global_rank))) for call in range(3)]
    torch.save(answers, folder / f"answers{fabric.global_rank}.pt")
    for norm in ("bn", "l2bn"):
        made = trainer(fabric, placing, Net(norm, torch.float64, small=True), 0.05)
        totals = made.train_epoch(Position(epoch=EPOCH))
        torch.save(
            {"losses": made.seen, "weights": made.network.state_dict(), "totals": totals.sums},
            folder / f"{norm}{fabric.global_rank}.pt",
        )


@pytest.fixture(scope="module")
def two_devices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes with joint batch statistics have computed."""
    folder = tmp_path_factory.mktemp("devices")
    compute(devices=2, sync_bn=True).fabric().launch(functools.partial(on_two_devices, folder=folder))
    return folder


@pytest.mark.parametrize("norm", ["bn", "l2bn"])
def test_two_devices_with_joint_statistics_equal_one(norm: str, two_devices: Path) -> None:
    first, second = (torch.load(two_devices / f"{norm}{rank}.pt") for rank in range(2))
    placing = compute()
    one = trainer(placing.fabric(), placing, Net(norm, torch.float64, small=True), 0.05)
    totals = one.train_epoch(Position(epoch=EPOCH))
    shares = [torch.stack(rank["losses"]) for rank in (first, second)]
    assert not torch.equal(*shares)
    torch.testing.assert_close((shares[0] + shares[1]) / 2, torch.stack(one.seen), rtol=1e-8, atol=0)
    for key, value in one.network.state_dict().items():
        torch.testing.assert_close(first["weights"][key], value, rtol=1e-6, atol=1e-9)
        assert torch.equal(first["weights"][key], second["weights"][key])
    assert torch.equal(first["totals"], second["totals"])
    torch.testing.assert_close(first["totals"], totals.sums)
    assert totals.sums[3] == STEPS * BATCH


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_get_the_minimum_one_call_later(rank: int, two_devices: Path) -> None:
    assert torch.load(two_devices / f"answers{rank}.pt") == [None, 0, 10]


def test_one_process_gets_its_number_one_call_later() -> None:
    minimum, number = DelayedMin(), torch.tensor(3.0)
    assert minimum(number) is None
    number.fill_(4.0)  # the answer is what the number was when it was asked for
    assert minimum(number) == 3
    assert minimum(number) == 4


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.cuda
@needs_cuda
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # of torch 2.11's own compiler
@pytest.mark.parametrize("compiler", [False, True, "graphs"])
@pytest.mark.parametrize("norm", ["bn", "l2bn"])
def test_a_gpu_has_the_losses_of_the_plain_loop(norm: str, compiler: bool | str) -> None:
    fast = of_the_trainer(Net(norm, torch.float64, fused=True), 0.05, device="cuda", compile=compiler)
    torch.testing.assert_close(fast, of_the_plain_loop(Net(norm, torch.float64), 0.05), rtol=1e-8, atol=0)


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize(
    ("dtype", "precision", "tolerance"),
    [(torch.float64, "32-true", 1e-8), (torch.float32, "bf16-mixed", 1e-2), (torch.float32, "16-mixed", 1e-2)],
)
@pytest.mark.parametrize("norm", ["bn", "l2bn"])
def test_a_recorded_network_takes_the_steps_of_an_eager_one(
    norm: str, dtype: torch.dtype, precision: str, tolerance: float
) -> None:
    """Running statistics and dropout's random numbers too, which recording uses up."""
    losses, states = [], []
    for compiler in (False, "graphs"):
        net = Net(norm, dtype, small=True)
        assert isinstance(net.body, nn.Sequential)
        net.body.insert(len(net.body) - 1, nn.Dropout(0.3))
        placing = compute(device="cuda", precision=precision, compile=compiler)
        placing.set_up()
        made = trainer(placing.fabric(), placing, net, 0.05)
        made.train_epoch(Position(epoch=EPOCH))
        losses.append(torch.stack(made.seen))
        states.append({key: value for key, value in net.state_dict().items() if not key.endswith("weight")})
    torch.testing.assert_close(losses[1], losses[0], rtol=tolerance, atol=0)
    torch.testing.assert_close(states[1], states[0], rtol=tolerance, atol=tolerance)
    assert losses[0][0] != losses[0][-1]


@pytest.mark.cuda
@needs_cuda
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("precision", ["32-true", "tf32-mixed", "bf16-mixed", "16-mixed"])
def test_the_host_never_waits_within_an_epoch(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("l2bn.training.loop.CHECK_EVERY", 3)
    steps_watched = []

    def watch(position: Position) -> None:
        """From the end of the first step, which makes the optimizer's state, to that of the last."""
        torch.cuda.set_sync_debug_mode("error" if position.step < STEPS else "default")
        steps_watched.append(position.step)

    placing = compute(device="cuda", precision=precision)
    placing.set_up()
    made = trainer(placing.fabric(), placing, Net("bn", torch.float32), 1e-3, watch)
    try:
        made.train_epoch(Position(epoch=EPOCH))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert steps_watched == list(range(1, STEPS + 1))
