"""What the hooks see of a network: each norm layer's input and output, and the features before the classifier."""

import contextlib
import gc
from collections import OrderedDict
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torchvision
from torch import Tensor, nn

from l2bn import swap_norm
from l2bn.analysis.features import measure
from l2bn.analysis.moments import Moments
from l2bn.analysis.probe import SAMPLED_CLASSES, SAMPLED_IMAGES, Probe, _warn_of_rows, classifier, shrink
from l2bn.backbones.resnet import cifar_resnet
from l2bn.errors import UserError
from l2bn.norms.swap import norm_layers
from l2bn.records import CLASS_MEASURES, FeatureRow
from l2bn.training.observation import AnalysisPolicy, check_observable

K = 3


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 5, 3))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, K))
    model = nn.Sequential(body, nn.BatchNorm2d(5), nn.ReLU(inplace=True), head).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


def images(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, 8, 8, generator=generator), torch.randint(K, (count,), generator=generator)


def look(model: nn.Module, x: Tensor, labels: Tensor, batch: int = 16) -> Probe:
    probe = Probe(model, norm_layers(model), K)
    with torch.inference_mode(), probe.attached():
        for some, their in zip(x.split(batch), labels.split(batch), strict=True):
            probe.expect(their)
            model(some)
    return probe


def test_each_layer_is_measured_at_its_input_and_output_in_the_order_in_which_it_runs() -> None:
    model = small_net()
    x, labels = images(50)
    row = look(model, x, labels).row(epoch=3, step=70)
    assert (row["epoch"], row["step"], row["images"]) == (3, 70, 50)
    assert [layer["name"] for layer in row["layers"]] == ["0.1", "1"]
    with torch.no_grad():
        before = model[0][0](x)
        after = model[0][1](before)
        second = model[0][3](model[0][2](after.clone()))
        third = model[1](second)
        last = model[3][:4](model[2](third.clone()))
    first_layer, second_layer = row["layers"]
    for found, features in (
        (first_layer["input"], before),
        (first_layer["output"], after),
        (second_layer["input"], second),
        (second_layer["output"], third),
        (row["penultimate"], last),
    ):
        moments = Moments.zeros(K, features.shape[1], features.device)
        moments.add(features, labels)
        assert found == pytest.approx(measure(moments), rel=1e-4)
    assert sum(first_layer["norms"]["counts"]) == 50


def test_the_network_is_left_as_it_was() -> None:
    model = small_net()
    x, labels = images(20)
    expected = model(x)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    look(model, x, labels)
    assert torch.equal(model(x), expected)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_hooks_go_when_the_evaluation_fails() -> None:
    model = small_net()
    with pytest.raises(RuntimeError), Probe(model, norm_layers(model), K).attached():
        model(torch.zeros(1, 7, 8, 8))
    assert not any(module._forward_hooks for module in model.modules())


def test_layers_that_stand_in_the_place_of_batch_norm_are_found_by_its_names() -> None:
    model = cifar_resnet(K)
    names = norm_layers(model)
    swap_norm(model, lambda bn: nn.GroupNorm(1, bn.num_features))
    x, labels = images(4)
    row = look_at(model.eval(), names, x, labels)
    assert {layer["name"] for layer in row["layers"]} == set(names)
    assert all(layer["shrink"] is None for layer in row["layers"])
    order = [layer["name"] for layer in row["layers"]]
    assert order.index("layer2.0.bn2") < order.index("layer2.0.downsample.1")


def test_a_layer_by_the_name_of_a_measure_is_a_layer() -> None:
    """Its sums are its own, not part of those before the classifier."""
    layers = {"penultimate": nn.BatchNorm2d(3), "flatten": nn.Flatten(), "fc": nn.Linear(3 * 16 * 16, K)}
    model = nn.Sequential(OrderedDict(layers)).eval()
    x, labels = torch.randn(8, 3, 16, 16), torch.arange(8) % K
    row = look_at(model, ("penultimate",), x, labels)
    other = look_at(nn.Sequential(*model), ("0",), x, labels)
    assert [layer["name"] for layer in row["layers"]] == ["penultimate"]
    assert row["penultimate"] == other["penultimate"]
    assert row["layers"][0]["input"] == other["layers"][0]["input"]


def look_at(model: nn.Module, names: tuple[str, ...], x: Tensor, labels: Tensor) -> FeatureRow:
    probe = Probe(model, names, K)
    with torch.inference_mode(), probe.attached():
        probe.expect(labels)
        model(x)
    return probe.row(1, 1)


def test_a_layer_over_tokens_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    """As in timm's levit_128s, whose batch norm gets (N * tokens, C)."""
    stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(2), nn.Flatten(0, 1))
    tokens = nn.Sequential(nn.BatchNorm1d(36), nn.Unflatten(0, (-1, 4)), nn.Flatten())
    model = nn.Sequential(stem, tokens, nn.Linear(144, K)).eval()
    _warn_of_rows.cache_clear()
    row = look(model, *images(40)).row(1, 1)
    assert [layer["name"] for layer in row["layers"]] == ["0.1"]
    assert [record.message.partition(",")[0] for record in caplog.records] == [
        "norm layers that get another number of rows than images"
    ]


class OfTokens(nn.Module):
    """Classifies each of 36 tokens of an image, and takes the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(2))
        self.head = nn.Linear(4, K)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.stem(x).mT).mean(1)
        return logits


def test_features_of_a_classifier_over_tokens_are_their_mean() -> None:
    model = OfTokens().eval()
    x, labels = images(40)
    with torch.no_grad():
        features = model.stem(x).mean(2)
    moments = Moments.zeros(K, 4, features.device)
    moments.add(features, labels)
    probe = look(model, x, labels)
    expected = measure(moments)
    found = probe.row(1, 1)["penultimate"]
    assert {name: found[name] for name in CLASS_MEASURES} == pytest.approx(
        {name: expected[name] for name in CLASS_MEASURES}, rel=1e-4
    )
    sample = probe.sample()
    assert sample is not None
    torch.testing.assert_close(torch.from_numpy(sample.features), features)


def test_it_holds_sums_and_not_images() -> None:
    model = small_net()

    def held(count: int) -> int:
        probe = look(model, *images(count))
        gc.collect()
        kept = sum(piece[2].numel() for piece in probe._pieces)
        return sum(t.numel() for sums in probe._sums.values() for t in sums.tensors) + kept

    assert held(300) == held(600)


def test_the_sample_is_the_first_images_of_each_class_in_their_order() -> None:
    model = small_net()
    x, labels = images(400)
    sample = look(model, x, labels).sample()
    assert sample is not None
    first = torch.cat([(labels == k).nonzero().flatten()[:SAMPLED_IMAGES] for k in range(K)]).sort().values
    assert len(sample.labels) == K * SAMPLED_IMAGES
    assert torch.equal(torch.from_numpy(sample.labels), labels[first])
    with torch.no_grad():
        expected = model[3][:4](model[2](model[1](model[0](x))))[first]
    torch.testing.assert_close(torch.from_numpy(sample.features), expected)


def test_test_images_of_later_classes_alone_give_no_sample() -> None:
    model = small_net()
    model[3][4] = nn.Linear(8, SAMPLED_CLASSES + 2)
    probe = Probe(model, norm_layers(model), SAMPLED_CLASSES + 2)
    x, labels = images(8)
    with torch.inference_mode(), probe.attached():
        probe.expect(SAMPLED_CLASSES + labels % 2)
        model(x)
    assert probe.row(1, 1)["images"] == 8
    assert probe.sample() is None


# ---- The penultimate features -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["resnet18", "mobilenetv3_small_050", "efficientnet_b0", "densenet121", "ghostnet_050", "vit_tiny_patch16_224"],
)
def test_the_classifier_of_a_timm_model_is_the_one_timm_names(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=7)
    assert classifier(model, 7) is model.get_classifier()


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("resnet18", "fc"),
        ("vgg11_bn", "classifier.6"),
        ("mobilenet_v2", "classifier.1"),
        ("squeezenet1_1", "classifier.1"),
    ],
)
def test_the_classifier_of_a_torchvision_model_is_its_last_layer(name: str, path: str) -> None:
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None, num_classes=7)
    assert classifier(model, 7) is model.get_submodule(path)


def test_a_linear_head_is_the_classifier_though_a_convolution_after_it_fits() -> None:
    """The order of the modules need not be that in which they run."""
    network = nn.Sequential(nn.Linear(64, K), nn.Conv2d(3, K, 3))
    assert classifier(network, K) is network[0]


def test_a_network_without_a_classifier_is_refused() -> None:
    with pytest.raises(ValueError, match="Sequential has no linear layer"):
        Probe(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), ("1",), K)


# ---- What eps leaves ----------------------------------------------------------------------------------------


def test_a_classifier_that_does_not_run_is_named() -> None:
    network = nn.ModuleList([nn.BatchNorm2d(3), nn.Linear(3, 2)])
    probe = Probe(network, ["0"], 2)
    with probe.attached(), torch.no_grad():
        probe.expect(torch.tensor([0, 1]))
        network[0](torch.randn(2, 3, 4, 4))
    with pytest.raises(ValueError, match="does not run in evaluation"):
        probe.row(1, 1)


def test_the_shrink_factor_is_the_deviation_of_the_evaluated_output() -> None:
    """Where the running statistics are those of the batch, exactly; here of 16 x 32 x 32 values, as in l2bn.py."""
    torch.manual_seed(0)
    x = torch.randn(64, 16, 32, 32)
    model = nn.Sequential(nn.BatchNorm2d(16, momentum=None))
    swap_norm(model, "l2bn")
    model[0].fused = "off"
    with torch.no_grad():
        model.train()(x)
        deviation = model.eval()(x).std((0, 2, 3)).mean()
    assert shrink(model[0]) == pytest.approx(float(deviation), rel=1e-3)
    assert shrink(model[0]) == pytest.approx(0.927, abs=0.001)
    assert shrink(nn.BatchNorm2d(4, eps=3.0)) == pytest.approx(0.5)
    assert shrink(nn.BatchNorm2d(4, track_running_stats=False)) is None


# ---- Several processes --------------------------------------------------------------------------------------


def see_a_share(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    model = small_net()
    probe = Probe(model, norm_layers(model), K)
    x, labels = images(401)
    with torch.inference_mode(), probe.attached():
        for some, their in zip(x.split(50), labels.split(50), strict=True):
            own = slice(len(some) * rank // 2, len(some) * (rank + 1) // 2)
            if len(some[own]):
                probe.expect(their[own])
                model(some[own])
        probe.join()
    sample = probe.sample()
    assert sample is not None
    torch.save((probe.row(1, 9), sample.features, sample.labels), f"{folder}/{rank}")
    dist.destroy_process_group()


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    model = small_net()
    whole = look(model, *images(401), batch=50)
    mp.start_processes(see_a_share, (str(tmp_path),), nprocs=2, start_method="fork")  # of inference alone
    sample = whole.sample()
    assert sample is not None
    for rank in range(2):
        row, features, labels = torch.load(tmp_path / str(rank), weights_only=False)
        assert flat(row) == pytest.approx(flat(whole.row(1, 9)), rel=1e-4)
        assert (labels == sample.labels).all()
        torch.testing.assert_close(torch.from_numpy(features), torch.from_numpy(sample.features))


def flat(row: FeatureRow) -> dict[str, float | None]:
    found = {f"penultimate {name}": value for name, value in row["penultimate"].items()}
    for layer in row["layers"]:
        for side in ("input", "output"):
            found |= {f"{layer['name']} {side} {name}": value for name, value in layer[side].items()}
        assert isinstance(layer["norms"]["first"], int)
    return found


def test_features_too_many_to_measure_are_refused() -> None:
    """A covariance of 25,088 features takes 5 GB, and its eigenvalues hours."""
    for width, said in ((8_192, ""), (8_193, "8,193 inputs.*pool the features")):
        with torch.device("meta"):
            model = nn.Sequential(nn.Linear(width, 3))
        with pytest.raises(UserError, match=said) if said else contextlib.nullcontext():
            check_observable(AnalysisPolicy(every=1), model, 3, {model[0]: {1}})
