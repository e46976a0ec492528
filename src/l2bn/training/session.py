"""The training of one run: restored from its checkpoint, trained, saved as it goes, and recorded at its end."""

import contextlib
import copy
import functools
import gc
import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from lightning_fabric import Fabric
from pydantic import ValidationError
from torch import nn

from l2bn.backbones.cost import count_parameters
from l2bn.data.loader import Batch, Loader, evaluation_loader, training_loader
from l2bn.data.splits import Images, Splits, stratified_order
from l2bn.errors import UserError
from l2bn.failures import FAILURE, run_errors
from l2bn.records import CONFIG, SUMMARY, FeatureRow, Record, Sample, first_fault, write_durably
from l2bn.training.checkpoint import CheckpointPolicy, RunState
from l2bn.training.compute import Compute
from l2bn.training.environment import import_options, note_start
from l2bn.training.interruption import EXIT_CODE, Interruption, run_lock
from l2bn.training.journal import Journal
from l2bn.training.loop import DelayedMin, DivergedError, Position, Trainer
from l2bn.training.observation import AnalysisPolicy, collect, compare_statistics, watched
from l2bn.training.optim import Recipe
from l2bn.training.plan import PlannedRun
from l2bn.training.progress import ProgressDisplay

log = logging.getLogger(__name__)

WEIGHTS = "weights.safetensors"
EVALUATION_BATCH = 512
AGREE_EVERY = 10  # steps between two exchanges among several processes on whether one was asked to stop


@dataclass(frozen=True, kw_only=True)
class BuiltRun:
    """A planned run in plain objects, ready to train."""

    run: PlannedRun
    splits: Splits
    model: nn.Module
    norm_layers: tuple[str, ...]  # their names
    recipe: Recipe
    compute: Compute
    checkpoint: CheckpointPolicy
    analysis: AnalysisPolicy
    code: dict[str, Any]  # of `describe_code`


def launch(built: BuiltRun) -> bool:
    """Train a run on its devices, with its folder locked. Does nothing if another process has just trained it.

    Returns True if a request to stop came too late to stop the run. Raises UserError; ends the process with
    `interruption.EXIT_CODE` after an earlier request.
    """
    run, fabric = built.run, built.compute.fabric()
    with run_errors(run.cell, run.folder), run_lock(run.folder), Interruption() as interruption:
        if (run.folder / SUMMARY).exists():
            return False
        (run.folder / FAILURE).unlink(missing_ok=True)  # of an earlier start
        write_durably(run.folder / CONFIG, run.as_yaml())
        built = replace(built, compute=built.compute.for_processes())
        task = functools.partial(train, built=built)
        try:
            if built.compute.devices == 1:
                fabric.launch(task, interruption)
            else:
                from l2bn.training.devices import launch_processes  # here: most runs have one device

                launch_processes(fabric, task, interruption, str(run.cell))
        except SystemExit as stop:
            if stop.code == EXIT_CODE:
                log.info("%s: stopped on request; the same command resumes it", run.cell)
            raise
        return interruption.signal is not None


def train(fabric: Fabric, interruption: Interruption, built: BuiltRun) -> None:
    """Train a run in this process, which with several devices is one of several."""
    with run_errors(built.run.cell, built.run.folder), contextlib.ExitStack() as stack:
        Session(fabric, built, interruption, stack).run()


class Session:
    """A run in one process: restored from its checkpoint, trained, and recorded. Only rank 0 writes files."""

    def __init__(
        self, fabric: Fabric, built: BuiltRun, interruption: Interruption, stack: contextlib.ExitStack
    ) -> None:
        """`stack` closes what the session opens."""
        from l2bn.training.acceleration import prepare  # here: a network's speed is no part of this file

        import_options()  # in a process of its own, too
        self.fabric, self.built, self.interruption = fabric, built, interruption
        self.leaving = DelayedMin()
        run, lead = built.run, fabric.is_global_zero
        built.compute.set_up()
        gc.collect()  # of an earlier run of this process, whose tensors on the GPU would count for this one
        if fabric.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(fabric.device)
        self.train_loader, self.test_loader = make_loaders(built, fabric)
        self.shuffled = functools.cache(functools.partial(make_shuffled_loader, built, fabric))
        self.steps, self.epochs = len(self.train_loader), built.recipe.epochs
        self.classes = built.splits.num_classes
        # Several processes share the memory of this run: its images may stay there, its weights must not.
        own = copy.deepcopy(built.model) if fabric.world_size > 1 else built.model
        self.network, trained, kernels = prepare(
            own,
            built.compute,
            fabric.device,
            updates=self.epochs * self.steps,
            in_memory=isinstance(built.splits.train, Images),
        )
        if kernels.endswith("+compiled"):
            # torch compiles eight networks of one class in a process and then no more: leave them to later runs.
            stack.callback(torch.compiler.reset)
        self.model, self.optimizer = fabric.setup(trained, built.recipe.optimizer(self.network))

        images = built.splits.fingerprint
        self.state = RunState(fabric, run, images, built.checkpoint, self.network, self.optimizer)
        self.position = self.state.restore()
        self.found: tuple[FeatureRow, Sample | None] | None = None  # measured, and not written yet
        self.journal: Journal | None = None
        if lead:
            step = self.position.epoch * self.steps + self.position.step
            facts = {**built.code, "channels_last": built.compute.channels_last}
            self.kernels = note_start(run.folder, fabric.device, kernels, facts, resumed=step > 0)
            self.journal = Journal(run.folder, self.position.rows, step)
            stack.callback(self.journal.close)
        self.display = ProgressDisplay(
            str(run.cell),
            epochs=self.epochs,
            steps=self.steps,
            batch_size=built.recipe.batch_size,
            shown=lead and run.config["progress"],
        )
        stack.enter_context(self.display.bar)

    def run(self) -> None:
        """Train to the end, or until the run diverges, and write its weights and its record."""
        # Not kept in the session: a cycle would keep the loaders' processes alive after the run.
        trainer = Trainer(
            fabric=self.fabric,
            model=self.model,
            network=self.network,
            optimizer=self.optimizer,
            recipe=self.built.recipe,
            train=self.train_loader,
            test=self.evaluation,
            classes=self.classes,
            seed=self.built.run.cell.seed,
            after_step=self.after_step,
            after_epoch=self.after_epoch,
        )
        divergence = None
        try:
            trainer.fit(self.position)
        except DivergedError as error:
            divergence = str(error)
            log.error("%s: %s; recorded as diverged", self.built.run.cell, error)
        if self.journal is not None:
            self.state.save_weights(self.built.run.folder / WEIGHTS)
            record = make_record(self.built, self.position, self.kernels, divergence)
            self.journal.conclude(record)
            record.write()

    def after_step(self, position: Position) -> float:
        """Measure, write a checkpoint if it is due, and stop if asked to; return the seconds of measuring."""
        self.display.step(position.epoch, position.step, position.seconds)
        measuring = self._compare_statistics(position.epoch * self.steps + position.step)
        stop = self._must_stop(position.step)
        if stop or (position.step < self.steps and self.built.checkpoint.due(position.step)):
            self.state.save(position)
        if stop:
            self.interruption.leave()
        return measuring

    def _compare_statistics(self, update: int) -> float:
        """Compare running and batch statistics, if that is due; return the seconds that it took."""
        policy = self.built.analysis
        if update > policy.statistics_until or update % policy.statistics_every:
            return 0.0
        if self.fabric.device.type == "cuda":
            torch.cuda.synchronize(self.fabric.device)  # the steps under way are no part of it
        began = time.perf_counter()
        row = compare_statistics(
            self.network, self.built.norm_layers, self.classes, self.shuffled(), self.fabric, update
        )
        if self.journal is not None:
            self.journal.append_statistics(row)
        return time.perf_counter() - began

    def evaluation(self, epoch: int) -> Iterator[Batch]:
        """Yield the test images, measure features if that is due, and stop between two batches if asked to.

        Several processes finish it: they need not have equally many batches at which to agree.
        """
        batches = self.test_loader.epoch(0)
        probe = None
        if self.built.analysis.measures_after(epoch, self.epochs):
            from l2bn.analysis.probe import Probe  # here: most runs measure none

            probe = Probe(self.network, self.built.norm_layers, self.classes)
            batches = watched(probe, batches)
        for batch in batches:
            if self.fabric.world_size == 1 and self._must_stop(0):
                self.state.save(self.position)  # after the last step of the epoch
                self.interruption.leave()
            yield batch
        if probe is not None:
            self.found = collect(probe, self.fabric, epoch, epoch * self.steps)

    def after_epoch(self, position: Position) -> None:
        """Write measurements, checkpoint and metrics, in this order, and stop if asked to."""
        if self.found is not None and self.journal is not None:
            row, sample = self.found
            kept = self.built.analysis.sample and position.epoch == self.epochs
            self.journal.append_features(row, sample if kept else None)
        self.found = None
        self.state.save(position)
        if self.journal is not None:
            self.journal.append(position.rows[-1])
            self.display.epoch(position.rows[-1])
        if self._must_stop(0) and position.epoch < self.epochs:
            self.interruption.leave()

    def _must_stop(self, step: int) -> bool:
        """Return whether a process was asked to stop; all processes of a run get the same answer at a step."""
        asked = self.interruption.signal is not None
        if self.fabric.world_size == 1:
            return asked
        if step % AGREE_EVERY and step < self.steps:
            return False
        return self.leaving(torch.full((), -float(asked), device=self.fabric.device)) == -1


def make_loaders(built: BuiltRun, fabric: Fabric) -> tuple[Loader, Loader]:
    """Return the loaders of training and test images, for this process's share of each batch."""
    placing = _placing(built, fabric)
    batch_size = evaluation_batch(built.recipe.batch_size, built.splits.image_size)
    return (
        training_loader(
            built.splits.train, batch_size=built.recipe.batch_size, seed=built.run.cell.seed, **placing
        ),
        evaluation_loader(built.splits.test, batch_size=batch_size, **placing),
    )


def evaluation_batch(training_batch: int, image_size: int) -> int:
    """Return the batch size of an evaluation, over all processes; `image_size` is the side of an image in pixels.

    It is 512 for images of up to 32 x 32 pixels. For larger ones it has as many pixels, or the batch size of
    training, whose activations and gradients fit into memory.
    """
    return min(EVALUATION_BATCH, max(training_batch, EVALUATION_BATCH * 32**2 // image_size**2))


def make_shuffled_loader(built: BuiltRun, fabric: Fabric) -> Loader:
    """Return the test images in about equal, stratified batches, which are the same in every run."""
    test = built.splits.test
    batch = evaluation_batch(built.recipe.batch_size, built.splits.image_size)
    shuffled = test.select(stratified_order(test.labels, "statistics"))
    return evaluation_loader(
        shuffled, batch_size=even_batch(len(test), batch, fabric.world_size), **_placing(built, fabric)
    )


def even_batch(images: int, most: int, least: int) -> int:
    """Return the size of about equal batches of at most `most` images, or more if the last one had under `least`.

    A process without an image of a batch would skip it, while the others wait for it in a joint norm layer.
    """
    sizes = (-(-images // batches) for batches in range(-(-images // most), 0, -1))
    return next((size for size in sizes if (images - 1) % size + 1 >= least), images)


def _placing(built: BuiltRun, fabric: Fabric) -> dict[str, Any]:
    return {
        "splits": built.splits,
        "device": fabric.device,
        "rank": fabric.global_rank,
        "world_size": fabric.world_size,
        "workers": built.compute.workers,
        "channels_last": built.compute.channels_last,
    }


def check_record(built: BuiltRun) -> None:
    """Raise UserError for a run whose record would be refused at its end, such as one of a seed of 20 digits."""
    try:
        make_record(built, Position(), "stock", "before its first step")
    except ValidationError as error:
        raise UserError(f"a record cannot hold this run: {first_fault(error)}") from error


def make_record(built: BuiltRun, position: Position, kernels: str, divergence: str | None) -> Record:
    """Return the record of a run that has ended."""
    run, splits, rows = built.run, built.splits, position.rows
    return Record(
        **asdict(run.cell),
        folder=run.folder,
        status="diverged" if divergence else "finished",
        label=splits.label,
        baseline=splits.baseline,
        precision=built.compute.precision,
        kernels=kernels,
        hash=run.hash,
        identity=run.identity,
        epochs=built.recipe.epochs,
        updates=int(rows[-1]["step"] or 0) if rows else 0,
        train_images=len(splits.train),
        test_images=len(splits.test),
        parameters=count_parameters(built.model),
        norm_layers=len(built.norm_layers),
        last=rows[-1] if rows else {},
        best=max(rows, key=lambda row: row["test/top1"] or 0.0) if rows else {},
        seconds=sum(row["seconds"] or 0.0 for row in rows),
        divergence=divergence,
        images=splits.fingerprint,
    )
