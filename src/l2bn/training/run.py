"""From a configuration to a record: the only reader of the configuration."""

import functools
import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import yaml
from lightning_fabric import Fabric
from torch import nn

from l2bn.data.loader import Loader, check_batch_size
from l2bn.data.splits import Fingerprint, Splits
from l2bn.errors import UserError
from l2bn.norms.swap import norm_layers, swap_norm
from l2bn.norms.sync import counterparts
from l2bn.records import CONFIG, SUMMARY, InvalidRecordError, Record, without_machine_paths
from l2bn.seeding import derive_seed
from l2bn.training.build import Builder, machine_keys
from l2bn.training.checkpoint import CheckpointPolicy, Checkpoints
from l2bn.training.compute import Compute, quieten
from l2bn.training.configuration import Settings, check_complete, make_folder, read_settings
from l2bn.training.identity import Cell, Config, check_images, differences, identity
from l2bn.training.loop import evaluate
from l2bn.training.observation import AnalysisPolicy, check_observable
from l2bn.training.optim import Recipe
from l2bn.training.session import Job, launch, make_loaders
from l2bn.training.state import fitting

log = logging.getLogger(__name__)


def run(config: Config, cell: Cell, files: list[str]) -> Record:
    """Train the run of a configuration to its end, from its last checkpoint if it has one; return its record.

    A run that has ended already is left alone. `files` are the files of `configs/` that the configuration was
    composed of. Raises UserError for what the user can mend; then no folder has been made.
    """
    quieten()
    builder = Builder(files)
    settings = read_settings(config, builder)
    folder = Path(settings.runs_dir) / cell.path
    record = find_record(folder, config)
    if record is not None:
        check_ended([(record, config)])
    else:
        job = make_job(config, settings, cell, folder, builder)
        make_folder(folder)
        launch(job)
        record = Record.read(folder)
    log.info("%s: %s; record in %s", cell, _result(record), folder)
    return record


def find_record(folder: Path, config: Config) -> Record | None:
    """The record of the run in a folder, if it has ended.

    Raises UserError if the folder holds a run of another identity: it is neither overwritten nor mixed.
    """
    record = None
    if (folder / SUMMARY).exists():
        try:
            record = Record.read(folder)
        except InvalidRecordError as error:
            raise UserError(f"{folder}: {error}\nmove the folder away to train this run anew") from error
    stored = record.identity if record else _stored_identity(folder / CONFIG)
    changed = differences(stored, identity(config)) if stored else []
    if changed:
        raise UserError(
            f"{folder} holds another run, which differs (there against here) in\n"
            + "".join(f"  {line}\n" for line in changed)
            + "give this one another runs_dir, or move the old folder away"
        )
    return record


def check_ended(runs: Iterable[tuple[Record, Config]]) -> None:
    """Raise UserError if ended runs were made on other images than those that their configurations name now.

    Images that cannot be read are logged, and the runs stand. A data set of several runs is read once.
    """
    found: dict[str, Fingerprint | None] = {}
    for record, config in runs:
        if record.images is None:
            continue
        key = yaml.safe_dump(config["dataset"])
        if key not in found:
            found[key] = _fingerprint(config, record.folder)
        present = found[key]
        if present is not None:
            check_images(record.images, asdict(present), record.folder)


def _fingerprint(config: Config, folder: Path) -> Fingerprint | None:
    try:
        splits: Splits = Builder().build(config["dataset"], "dataset", Splits)
    except UserError as error:
        log.warning("%s: its images cannot be compared with those present: %s", folder, error)
        return None
    return splits.fingerprint


def _stored_identity(path: Path) -> Config | None:
    """The identity of the run that a `config.yaml` describes, None where there is no such file."""
    if not path.exists():
        return None
    try:
        return identity(yaml.safe_load(path.read_text()))
    except (OSError, ValueError, yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged: {error}\nremove this file to go on with the run, whose checkpoints say which "
            "it is, or move the folder away to train it anew"
        ) from error


def check(config: Config, files: list[str]) -> None:
    """Raise UserError for what is wrong with a configuration, as far as it shows without its data, its network
    and the machine that it is for."""
    builder = Builder(files)
    read_settings(config, builder)
    builder.call(Recipe, config["recipe"], "recipe")
    builder.call(CheckpointPolicy, config["checkpoint"], "checkpoint")
    builder.call(AnalysisPolicy, config["analysis"], "analysis")
    builder.check(config["compute"], "compute", Compute)
    builder.build(config["norm"], "norm", functools.partial)
    builder.check(config["dataset"], "dataset")
    builder.check({**config["backbone"], "num_classes": 2}, "backbone")


def make_job(config: Config, settings: Settings, cell: Cell, folder: Path, builder: Builder) -> Job:
    """Build what a configuration describes. Raises UserError naming the key that is wrong."""
    recipe: Recipe = builder.call(Recipe, config["recipe"], "recipe")
    compute: Compute = builder.call(Compute, config["compute"], "compute")
    checkpoint: CheckpointPolicy = builder.call(CheckpointPolicy, config["checkpoint"], "checkpoint")
    analysis: AnalysisPolicy = builder.call(AnalysisPolicy, config["analysis"], "analysis")
    norm = builder.build(config["norm"], "norm", functools.partial)
    splits: Splits = builder.build(config["dataset"], "dataset", Splits)
    check_batch_size(recipe.batch_size, len(splits.train), compute.devices)
    torch.manual_seed(derive_seed(settings.seed, "weights"))
    if "num_classes" in config["backbone"]:
        raise UserError(
            f"backbone.num_classes follows from the data set, which has {splits.num_classes}: leave it out"
        )
    backbone = {**config["backbone"], "num_classes": splits.num_classes}
    model: nn.Module = builder.build(backbone, "backbone", nn.Module)
    check_fit(model, splits)
    layers = norm_layers(model)
    try:
        swap_norm(model, norm)
        if compute.sync_bn:
            counterparts(model)  # raises where a layer has none
    except (ValueError, TypeError) as error:
        raise UserError(f"norm: {error}") from error
    check_observable(analysis, model, splits.num_classes)
    return Job(
        cell=cell,
        folder=folder,
        config=yaml.safe_dump({**config, "cell": asdict(cell)}, sort_keys=False),
        identity=identity(config),
        seed=settings.seed,
        splits=splits,
        model=model,
        norm_layers=layers,
        recipe=recipe,
        compute=compute,
        checkpoint=checkpoint,
        analysis=analysis,
        progress=settings.progress,
    )


def check_fit(model: nn.Module, splits: Splits) -> None:
    """Raise UserError unless the model makes logits of the data set's classes of one of its images."""
    size, classes = splits.image_size, splits.num_classes
    model.eval()
    try:
        with torch.no_grad():
            logits = model(torch.zeros(1, 3, size, size))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise UserError(
            f"backbone: this network cannot take images of {size} x {size} pixels: {error}\n"
            "give it larger ones by dataset.image_size, where the data set has that, or take another backbone"
        ) from error
    finally:
        model.train()
    if not isinstance(logits, torch.Tensor) or logits.shape != (1, classes):
        found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise UserError(
            f"backbone: of one image this network makes {found}, not (1, {classes}): logits of each class"
        )


def replay(folder: Path, runs_dir: str, root: str | None = None) -> Record:
    """Train the run of a record once more, under `runs_dir`. Raises UserError.

    A record may come from anybody: its YAML is read as plain values, only what stands in `configs/` is called,
    and nothing is read or written where the record says: paths are those of the data set's YAML, or `root`.
    """
    config, cell = read_config(folder, root, foreign=True)
    return run({**config, "runs_dir": runs_dir}, cell, [])


def evaluate_run(folder: Path, device: str = "auto", root: str | None = None) -> tuple[float, float, float | None]:
    """Loss, top-1 and top-5 accuracy in percent of a run's last weights on its test images. Raises UserError."""
    opened = open_run(folder, device, root)
    state = opened.checkpoints.load(opened.fabric.device)
    if state is None:
        raise UserError(f"{folder} has no checkpoint to evaluate")
    check_images(state.get("images"), asdict(opened.job.splits.fingerprint), folder)
    with fitting(folder):
        opened.network.load_state_dict(state["model"])
    return evaluate(opened.network, opened.test, opened.job.splits.num_classes, opened.fabric)


@dataclass(frozen=True)
class OpenedRun:
    """A run that is there, on a device, without its weights."""

    job: Job
    fabric: Fabric
    network: nn.Module
    test: Loader
    checkpoints: Checkpoints


def open_run(folder: Path, device: str = "auto", root: str | None = None) -> OpenedRun:
    """The run in a folder as it was, on one device. Raises UserError."""
    quieten()
    config, cell = read_config(folder, root)
    # What is compiled is only ever trained.
    compute = {**config["compute"], "device": device, "devices": 1, "sync_bn": False, "compile": False}
    builder = Builder()
    settings = read_settings(config, builder)
    job = make_job({**config, "compute": compute}, settings, cell, folder, builder)
    job.compute.set_up()
    fabric = job.compute.fabric()
    network = job.compute.place(job.model, fabric.device, updates=0).network
    _, test = make_loaders(job, fabric)
    return OpenedRun(job, fabric, network, test, Checkpoints(folder / "checkpoints", []))


def read_config(folder: Path, root: str | None = None, *, foreign: bool = False) -> tuple[Config, Cell]:
    """The configuration and cell of a run or a published record.

    `root` says where the data set lies, if not where it lay in training. The paths that publishing leaves out,
    and all of a `foreign` record, are those of the data set's YAML. Raises UserError for a file that is missing
    or not a run's.
    """
    path = folder / CONFIG
    try:
        config = yaml.safe_load(path.read_text())
        cell = Cell(**config.pop("cell"))
        if cell.seed != config["seed"]:
            raise ValueError(f"the cell's seed is {cell.seed!r}, the configuration's {config['seed']!r}")
        if foreign:
            config = without_machine_paths(config)
            _check_inside(config["dataset"], "dataset")
        dataset = {**machine_keys(f"dataset/{cell.dataset.partition(',')[0]}.yaml"), **config["dataset"]}
        # A record from before there was an analysis says nothing of one.
        config = {"runs_dir": "runs", "analysis": {}, **config, "dataset": dataset}
        check_complete(config)
    except OSError as error:
        raise UserError(f"{folder} is not the folder of a run: {CONFIG}: {error.strerror}") from error
    except (
        yaml.YAMLError,
        UserError,
        UnicodeDecodeError,
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
    ) as error:
        raise UserError(f"{path} is not the configuration of a run: {error}") from error
    if root is not None:
        config["dataset"]["root"] = root
    return config, cell


def _check_inside(node: Config, path: str) -> None:
    """Raise UserError for a value that would lead out of the folder of the data set."""
    for key, value in node.items():
        if isinstance(value, dict):
            _check_inside(value, f"{path}.{key}")
        elif isinstance(value, str) and (Path(value).is_absolute() or ".." in Path(value).parts):
            raise UserError(
                f"{path}.{key} is {value!r}: a record may only name what lies within its data set's folder"
            )


def _result(record: Record) -> str:
    if record.status == "diverged":
        return f"diverged ({record.divergence})"
    return f"finished, test accuracy {record.last['test/top1']:.2f} % after the last of {record.epochs} epochs"
