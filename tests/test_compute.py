"""Precision, compilation, memory formats and processes of a run."""

import copy
import functools
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning_fabric.accelerators import MPSAccelerator
from torch import Tensor, nn

from conftest import ROOT, TINY, TRAIN, Train, finish, interrupted, start
from l2bn.errors import UserError
from l2bn.norms.l2bn import convert
from l2bn.norms.stepped import put_before
from l2bn.norms.swap import swap_norm
from l2bn.records import FEATURES
from l2bn.training import acceleration
from l2bn.training import compute as compute_module
from l2bn.training.acceleration import (
    BFLOAT16,
    UPDATES,
    Float32Conv2d,
    GraphedModule,
    prepare,
    should_compile,
    uses_cuda_graphs,
)
from l2bn.training.compute import Compute
from l2bn.training.instantiate import Builder

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MANY, FEW = UPDATES, UPDATES - 1


def compute(**options: Any) -> Compute:
    settings = yaml.safe_load((ROOT / "configs/compute/auto.yaml").read_text())
    return Compute(**settings | options)


def backbone(name: str) -> nn.Module:
    node = yaml.safe_load((ROOT / f"configs/backbone/{name}.yaml").read_text())
    with torch.device("meta"):
        return Builder().build({**node, "num_classes": 10}, "backbone")


@pytest.fixture
def _flags() -> Any:
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.usefixtures("_flags")
def test_float32_is_not_rounded_behind_the_users_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch lets cuDNN round the factors of float32 convolutions to TF32 unless it is told not to."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    compute(threads=1).set_up()
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    compute(threads=1, precision="tf32-mixed").set_up()
    assert torch.backends.cudnn.allow_tf32
    assert torch.backends.cuda.matmul.allow_tf32


def test_a_mac_trains_on_its_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fabric would choose MPS, which has no float64 to sum accuracies in."""
    monkeypatch.setattr(MPSAccelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert compute(device="auto").fabric().device.type == "cpu"


def test_the_processes_of_a_run_meet_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a pod or on a second node, whose environment says where those of one large job would meet."""
    for name, value in (("MASTER_ADDR", "pod-0"), ("MASTER_PORT", "23456"), ("NODE_RANK", "1")):
        monkeypatch.setenv(name, value)
    strategies: list[Any] = [compute(device="cpu", devices=2).fabric().strategy for _ in range(2)]
    places = [strategy.cluster_environment for strategy in strategies]
    assert [(place.main_address, place.node_rank()) for place in places] == 2 * [("127.0.0.1", 0)]
    assert len({23456, *(place.main_port for place in places)}) == 3


@pytest.mark.usefixtures("_flags")
@pytest.mark.parametrize(("threads", "devices", "own"), [(8, 1, 8), (8, 2, 4), (1, 2, 1)])
def test_the_processes_of_a_run_share_its_threads(
    threads: int, devices: int, own: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    compute(device="cpu", threads=threads, devices=devices).set_up()
    assert taken == [own]


@pytest.mark.usefixtures("_flags")
@pytest.mark.parametrize(
    ("devices", "environment", "own"), [(1, {}, [4]), (2, {}, [2]), (1, {"OMP_NUM_THREADS": "64"}, [])]
)
def test_a_run_in_a_container_has_the_threads_that_its_limit_allows(
    devices: int, environment: dict[str, str], own: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch takes as many as the machine has cores."""
    taken: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    monkeypatch.setattr(compute_module, "available_cores", lambda: 4)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    settings = compute(device="cpu", devices=devices).for_processes()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # of a new process, which may have a share already
    if devices == 1:
        monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    settings.set_up()
    assert taken == own


def test_a_gpu_without_tf32_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would compute in float32 what the record calls TF32."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for capability in ((7, 5), (8, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda found=capability: found)
        expected = pytest.raises(ValueError, match="compute capability") if capability == (7, 5) else nullcontext()
        with expected:
            compute(device="cuda", precision="tf32-mixed")


@pytest.mark.usefixtures("_flags")
@pytest.mark.parametrize(("capability", "told"), [((7, 5), True), ((8, 0), False)])
def test_a_gpu_on_which_bfloat16_is_slow_is_told(
    capability: tuple[int, int], told: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    compute(device="cuda", precision="bf16-mixed", threads=1).set_up()
    assert ("try 16-mixed" in caplog.text) == told


@pytest.fixture(params=[True, False], ids=["a compiler", "no compiler"])
def works(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether a compiler works, here as on a machine with CUDA."""
    monkeypatch.setattr(acceleration, "compiler_works", lambda _: request.param)
    return bool(request.param)


@pytest.mark.parametrize("wanted", [True, False])
def test_a_wish_to_compile_is_followed_or_refused(wanted: Any, works: bool) -> None:
    model = backbone("resnet20")
    if wanted and not works:
        with pytest.raises(UserError, match=r"compile=true, but no compiler works for cpu.*install one"):
            should_compile(wanted, model, CPU, 1)
    else:
        assert should_compile(wanted, model, CPU, 1) == bool(wanted)


@pytest.mark.parametrize("name", ["resnet20", "shufflenetv2_x1_0"])
def test_no_short_run_is_compiled_unasked(name: str) -> None:
    for device in (CPU, CUDA, torch.device("mps")):
        assert not should_compile("auto", backbone(name), device, FEW)


def test_on_a_cpu_networks_are_compiled_whose_channels_fill_no_vectors(works: bool) -> None:
    for name in ("resnet20", "vgg16", "mobilenetv2_x1_0", "shufflenetv2_x0_5"):
        assert not should_compile("auto", backbone(name), CPU, MANY)
    assert should_compile("auto", backbone("shufflenetv2_x1_0"), CPU, UPDATES) == works


@pytest.fixture
def _recorder_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warms up as torch's does, and leaves the kernels to eager code; test_same_result.py has the real one."""

    def warmed_up(network: nn.Module, batch: tuple[Tensor], allow_unused_input: bool) -> nn.Module:
        for _ in range(3):
            network(*batch).sum().backward()
        return network

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", warmed_up)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda _: torch.get_rng_state())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, _: torch.set_rng_state(state))


@pytest.mark.usefixtures("_recorder_on_the_cpu")
def test_recording_leaves_no_trace() -> None:
    """In running statistics and random numbers; batches of another size and evaluation are as before."""

    def answers(record: bool) -> list[Tensor]:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
        model = GraphedModule(network) if record else network
        logits = [
            model.train(mode)(torch.randn(n, 3, 8, 8)) for n, mode in ((4, True), (4, True), (3, True), (5, False))
        ]
        return [*logits, *network.buffers()]

    torch.testing.assert_close(answers(record=True), answers(record=False), rtol=0, atol=0)


def test_a_failed_recording_names_the_first_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", fail)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda _: None)
    with pytest.raises(
        UserError, match=r"\(operation not permitted when stream is capturing\); take compute.compile=false"
    ):
        GraphedModule(nn.Linear(2, 2))(torch.randn(3, 2))


@pytest.mark.parametrize("name", ["resnet20", "shufflenetv2_x1_0"])
@pytest.mark.usefixtures("works")
def test_nothing_is_compiled_on_a_gpu_unasked(name: str) -> None:
    assert not should_compile("auto", backbone(name), CUDA, MANY)


@pytest.mark.parametrize(
    ("options", "device", "in_memory"),
    [
        ({}, CPU, True),
        ({}, CUDA, False),
        ({"compile": False}, CUDA, True),
        ({"devices": 2}, CUDA, True),
        ({"precision": "bf16-mixed"}, CUDA, True),
    ],
)
def test_graphs_are_recorded_unasked_only_where_that_was_measured(
    options: dict[str, Any], device: torch.device, in_memory: bool
) -> None:
    model = backbone("shufflenetv2_x0_5")
    assert uses_cuda_graphs(compute(device="cpu", compile="auto"), model, CUDA, in_memory=True)
    assert not uses_cuda_graphs(
        compute(**{"device": "cpu", "compile": "auto", **options}), model, device, in_memory
    )


class OwnLayer(nn.Identity):
    """Like a user's own, which may decide anew at each step."""


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda model: model.add_module("extra", OwnLayer()), "OwnLayer"),
        (lambda model: swap_norm(model, lambda bn: put_before(bn, lambda x, scale: x, "unit")), "BatchNorm2d"),
        (lambda model: vars(model).update(forward=lambda x: x), "with a forward of its own"),
        (lambda model: model.register_forward_hook(lambda *_: None), "with hooks"),
        (lambda model: model.register_full_backward_pre_hook(lambda *_: None), "with hooks"),
        (
            lambda model: next(model.parameters()).register_hook(lambda gradient: gradient / 2),
            "Conv2d with hooks of its parameters",
        ),
        (
            lambda model: swap_norm(model, lambda bn: nn.BatchNorm2d(bn.num_features, momentum=None)),
            "BatchNorm2d with momentum null",
        ),
    ],
)
def test_what_may_decide_anew_at_each_step_is_not_recorded_unasked(
    change: Callable[[nn.Module], object], named: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    model = backbone("resnet20")
    change(model)
    assert not uses_cuda_graphs(compute(device="cpu", compile="auto"), model, CUDA, in_memory=True)
    assert f"{named} may do other things at other steps" in caplog.text


@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize("name", ["resnet20", "shufflenetv2_x1_0", "mobilenetv2_x1_0"])
@pytest.mark.usefixtures("works")
def test_both_norms_decide_alike(name: str, device: torch.device) -> None:
    bn, l2bn = backbone(name), backbone(name)
    swap_norm(l2bn, convert)
    for updates in (FEW, MANY):
        assert should_compile("auto", bn, device, updates) == should_compile("auto", l2bn, device, updates)


# ---- bfloat16 -------------------------------------------------------------------------------------------------


def depthwise(stride: int = 1, kernel: int = 3, channels: int = 1) -> nn.Conv2d:
    """A convolution with this many channels a group."""
    return nn.Conv2d(16, 16, kernel, stride, padding=kernel // 2, groups=16 // channels)


SLOW = {
    "strided": depthwise(2),
    "5 x 5": depthwise(kernel=5),
    "four a group, strided": depthwise(2, channels=4),
}
FAST = {
    "3 x 3": depthwise(),
    "eight a group, strided": depthwise(2, channels=8),
    "ungrouped": depthwise(2, kernel=5, channels=16),
}


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
@pytest.mark.parametrize("name", [*SLOW, *FAST])
def test_on_a_cpu_bfloat16_leaves_out_the_convolutions_that_it_makes_slower(
    name: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Autocast is off while they compute, and their output has the type of the map before."""
    layer = copy.deepcopy((SLOW | FAST)[name])
    names = list(layer.state_dict())
    seen: list[bool] = []
    model = nn.Sequential(nn.Conv2d(3, 16, 1), layer, nn.BatchNorm2d(16))
    prepare(model, compute(device="cpu", precision=precision), CPU, FEW)
    assert list(layer.state_dict()) == names
    stock = nn.Conv2d._conv_forward

    def watched(*arguments: Any) -> Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return stock(*arguments)

    monkeypatch.setattr(nn.Conv2d, "_conv_forward", watched)
    halves = precision == "bf16-mixed"
    with torch.autocast("cpu", torch.bfloat16, enabled=halves):
        y = model[:2](torch.randn(2, 3, 8, 8))
    assert y.dtype == (torch.bfloat16 if halves else torch.float32)
    assert seen == [halves, halves and name in FAST]


def test_a_convolution_left_in_float32_computes_what_it_computes_by_itself() -> None:
    layer = copy.deepcopy(SLOW["strided"])
    x = torch.randn(2, 16, 6, 6, dtype=torch.bfloat16)
    expected = layer(x.float())
    layer.__class__ = Float32Conv2d
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    torch.testing.assert_close(y, expected.bfloat16(), rtol=0, atol=0)
    gradients = [torch.autograd.grad(t.float().sum(), layer.weight)[0] for t in (y, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(("name", "count"), [("mobilenetv2_x0_5", 3), ("shufflenetv2_x0_5", 6), ("resnet20", 0)])
def test_the_strided_depthwise_convolutions_of_the_grid_stay_in_float32(name: str, count: int) -> None:
    model = backbone(name)
    prepare(model.to_empty(device="cpu"), compute(device="cpu", precision="bf16-mixed"), CPU, FEW)
    assert sum(isinstance(layer, Float32Conv2d) for layer in model.modules()) == count


@pytest.mark.parametrize("present", [True, False])
def test_a_processor_without_bfloat16_gets_a_warning(
    present: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {BFLOAT16[0]: present, "avx2": True})
    prepare(nn.Sequential(nn.BatchNorm2d(4)), compute(device="cpu", precision="bf16-mixed"), CPU, FEW)
    assert any("no bfloat16 instructions" in message for message in caplog.messages) != present


@pytest.mark.slow
def test_a_compiled_run_is_recorded_as_such_and_can_be_looked_into(train: Train) -> None:
    """What is evaluated and observed is the network itself."""
    from l2bn.training.existing import evaluate_run

    record = train("norm=bn", "recipe.epochs=1", "compute.compile=true", "analysis=on", *TINY)
    assert record.kernels == "stock+compiled"
    assert (record.folder / FEATURES).exists()
    loss, top1, _ = evaluate_run(record.folder, device="cpu")
    assert (loss, top1) == (pytest.approx(record.last["test/loss"]), record.last["test/top1"])


@pytest.mark.parametrize(("norm", "kernels"), [("bn", "stock+compiled"), ("l2bn", "plain+compiled")])
def test_an_older_torch_compiles_the_definition_and_the_record_says_so(
    norm: str, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acceleration, "TRACED", False)
    monkeypatch.setattr(torch, "compile", lambda network, **_: network)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    swap_norm(model, norm)
    assert prepare(model, compute(device="cpu", compile=True), CPU, MANY).kernels == kernels


@pytest.mark.slow
def test_each_run_of_a_process_is_compiled(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's limit is the process's; above it networks run as they are, and the record would say otherwise."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch.compiler.reset()  # of what other tests have compiled
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        for norm in ("bn", "l2bn"):
            train(f"norm={norm}", "recipe.epochs=1", "compute.compile=true", *TINY)


@pytest.mark.parametrize("before", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_run_goes_on_in_the_other_memory_format(
    before: bool, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels that walk through weights and momentum side by side need both laid out alike."""
    whole = train("recipe.epochs=2", *TINY, f"compute.channels_last={before}")
    resumed = ("recipe.epochs=2", *TINY, f"runs_dir={tmp_path / 'resumed'}")
    interrupted(9, train, *resumed, f"compute.channels_last={before}")
    laid_out = []

    def look(self: Any, position: Any) -> None:
        for parameter, kept in self.optimizer.state.items():
            laid_out.append(kept["momentum_buffer"].stride() == parameter.stride())

    with monkeypatch.context() as patch:
        patch.setattr("l2bn.training.loop.Trainer.fit", look)
        patch.setattr("l2bn.training.checkpoint.RunState.save_weights", lambda *_: pytest.fail("far enough"))
        with pytest.raises(pytest.fail.Exception):
            train(*resumed, f"compute.channels_last={not before}")
    assert len(laid_out) == 65
    assert all(laid_out)
    record = train(*resumed, f"compute.channels_last={not before}")
    assert record.last["train/loss"] == pytest.approx(whole.last["train/loss"], rel=0.1)


@pytest.mark.slow
def test_several_devices_within_a_sweep_under_a_scheduler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one task of Slurm, whose variables speak of one process, each run of a sweep starts two."""
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "l2bn", "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1"}
    slurm |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_STEP_ID": "0"}
    options = ("compute=ddp", "compute.device=cpu", "norm=bn,l2bn", "recipe.epochs=2", *TINY)
    environment = {**os.environ, **slurm, "SLURM_NODELIST": "node", "OMP_NUM_THREADS": "1"}
    finish(start(TRAIN, "-m", f"runs_dir={tmp_path}", *options, env=environment))
    records = sorted(tmp_path.rglob("summary.json"))
    assert [re.search(r"/(bn|l2bn)/", str(path))[1] for path in records] == ["bn", "l2bn"]  # type: ignore[index]
    for path in records:
        config = yaml.safe_load((path.parent / "config.yaml").read_text())
        assert config["compute"]["devices"] == 2


# ---- Freed memory stays with the process, so that later steps touch fewer new pages ---------------------------

STEPS = """
import resource
import torch
from torch import nn
from l2bn.training.compute import free_as_usual, keep_freed_memory
for rule in {rules}:
    assert rule()
x = torch.randn(32, 64, 72, 72, requires_grad=True)  # 42 MB
layer = nn.BatchNorm2d(64)
def step():
    x.grad = None
    layer(x).sum().backward()
for _ in range(20):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(*rules: str) -> int:
    code = STEPS.format(rules=f"({''.join(f'{rule}, ' for rule in rules)})")
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator can be told")
@pytest.mark.slow
def test_later_steps_meet_less_than_half_the_new_pages() -> None:
    usual = page_faults()
    assert page_faults("keep_freed_memory") < 0.5 * usual
    assert page_faults("keep_freed_memory", "free_as_usual") > 0.5 * usual
