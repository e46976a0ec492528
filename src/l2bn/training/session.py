"""The life of one run: restored, trained, saved at every turn, and recorded at its end."""

import contextlib
import copy
import functools
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import nn
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from l2bn.data.loader import Loader, evaluation_loader, training_loader
from l2bn.data.splits import Splits, stratified_order
from l2bn.errors import UserError
from l2bn.norms.l2bn import warn_if_few_updates
from l2bn.records import CONFIG, Images, Record, write_durably
from l2bn.training.agreement import Agreement
from l2bn.training.checkpoint import CheckpointPolicy
from l2bn.training.compute import Compute
from l2bn.training.environment import note_start
from l2bn.training.failure import noted
from l2bn.training.faults import explain_faults
from l2bn.training.identity import Cell, hash_identity
from l2bn.training.interruption import EXIT_CODE, Interruption, follow_parent, sole_owner
from l2bn.training.journal import Journal
from l2bn.training.loop import DivergedError, Position, Trainer
from l2bn.training.observation import AnalysisPolicy, Network, Observer
from l2bn.training.optim import Recipe
from l2bn.training.progress import ProgressDisplay
from l2bn.training.state import State

log = logging.getLogger(__name__)

WEIGHTS = "weights.safetensors"
EVALUATION_BATCH = 512
AGREE_EVERY = 10  # updates after which several processes ask each other whether one was told to leave


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one run is to do, in plain objects."""

    cell: Cell
    folder: Path
    config: str  # the content of config.yaml
    identity: dict[str, Any]
    seed: int
    splits: Splits
    model: nn.Module
    norm_layers: tuple[str, ...]  # their names
    recipe: Recipe
    compute: Compute
    checkpoint: CheckpointPolicy
    analysis: AnalysisPolicy
    progress: bool


def launch(job: Job) -> None:
    """Train a job on its devices, as the only process at work on it.

    Raises UserError; ends the process with `interruption.EXIT_CODE` once it was told to leave.
    """
    fabric = job.compute.fabric()
    with explain_faults(job.cell, job.folder), sole_owner(job.folder), noted(job.folder):
        write_durably(job.folder / CONFIG, job.config)
        if job.compute.devices == 1:
            fabric.launch(functools.partial(train, job=job))
            return
        with Interruption() as interruption:
            try:
                fabric.launch(functools.partial(train, job=job))
            except ProcessRaisedException as error:
                message = _user_error(error.msg)
                if message is None:
                    raise
                raise UserError(message) from error
            except ProcessExitedException as error:
                # Told before they could take note of it, the processes have died of it.
                if error.exit_code == EXIT_CODE or interruption.signal is not None:
                    interruption.leave()
                    raise SystemExit(EXIT_CODE) from error
                raise UserError(
                    f"{job.cell}: the process of device {error.error_index} was ended "
                    f"({error.signal_name or f'exit code {error.exit_code}'}); "
                    "the same command resumes from the last checkpoint"
                ) from error


def _user_error(traceback: str) -> str | None:
    """What the UserError of another process says, of the traceback that came over; None for another exception."""
    own = f"{UserError.__module__}.{UserError.__qualname__}: "
    return traceback.rpartition(own)[2].strip() if own in traceback else None


def train(fabric: Fabric, job: Job) -> None:
    """Train a run from its last checkpoint, or from the start, to its end and its record.

    Of several devices each has a process that is here; the first one alone writes.
    """
    lead = fabric.is_global_zero
    with contextlib.ExitStack() as stack:
        stack.enter_context(explain_faults(job.cell, job.folder))  # here, too: of several devices each is a process
        interruption = stack.enter_context(Interruption())
        if fabric.world_size > 1:
            follow_parent()
        job.compute.set_up()
        train_loader, test_loader = make_loaders(job, fabric)
        steps, epochs = len(train_loader), job.recipe.epochs
        # Several processes are handed one memory: the images may stay there, the weights must not.
        own = copy.deepcopy(job.model) if fabric.world_size > 1 else job.model
        network, trained, kernels = job.compute.place(own, fabric.device, updates=epochs * steps)
        if trained is not network:
            # Of one kind of network torch compiles eight in a process and then, with a warning, no more: leave them
            # to the sweep's next runs.
            stack.callback(torch.compiler.reset)
        model, optimizer = fabric.setup(trained, job.recipe.optimizer(network))

        images = asdict(job.splits.fingerprint)
        state = State(fabric, job.folder, job.identity, images, job.checkpoint, network, optimizer)
        position = state.restore()
        if lead:
            warn_if_few_updates(job.model, epochs * steps)
            kernels = note_start(job.folder, fabric.device, kernels)
            journal = Journal(job.folder, job.cell, position.rows, position.epoch * steps + position.step)
            stack.callback(journal.close)
        observer = Observer(
            policy=job.analysis,
            fabric=fabric,
            network=Network(module=network, layers=job.norm_layers, classes=job.splits.num_classes),
            make_shuffled=functools.partial(make_shuffled_loader, job, fabric),
            epochs=epochs,
            steps=steps,
            journal=journal if lead else None,
        )
        display = stack.enter_context(
            ProgressDisplay(
                str(job.cell),
                epochs=epochs,
                steps=steps,
                batch_size=job.recipe.batch_size,
                shown=lead and job.progress,
            )
        )

        leave = Agreement()

        def must_leave(step: int) -> bool:
            told = interruption.signal is not None
            if fabric.world_size == 1:
                return told
            if step % AGREE_EVERY and step < steps:
                return False
            return leave.ask(torch.full((), -float(told), device=fabric.device)) == -1

        def after_step(position: Position) -> None:
            display.step(position.epoch, position.step, position.seconds)
            observer.after_step(position)
            leaving = must_leave(position.step)
            if leaving or (position.step < steps and job.checkpoint.due(position.step)):
                state.save(position)
            if leaving:
                interruption.leave()

        def after_epoch(position: Position) -> None:
            observer.after_epoch(position)
            state.save(position)
            if lead:
                journal.append(position.rows[-1])
                display.epoch(position.rows[-1])
            if must_leave(0) and position.epoch < epochs:
                interruption.leave()

        trainer = Trainer(
            fabric=fabric,
            model=model,
            network=network,
            optimizer=optimizer,
            recipe=job.recipe,
            train=train_loader,
            test=test_loader,
            classes=job.splits.num_classes,
            seed=job.seed,
            after_step=after_step,
            after_epoch=after_epoch,
            watch=observer.watch,
        )
        divergence = None
        try:
            trainer.fit(position)
        except DivergedError as error:
            divergence = str(error)
            log.error("%s: %s; recorded as diverged", job.cell, error)
        if lead:
            state.save_weights(job.folder / WEIGHTS)
            record = make_record(job, position, kernels, divergence)
            journal.conclude(record)
            record.write()


def make_loaders(job: Job, fabric: Fabric) -> tuple[Loader, Loader]:
    """The loaders of training and test images, of this process's share of each batch."""
    placing = _placing(job, fabric)
    batch_size = evaluation_batch(job.recipe.batch_size, job.splits.image_size)
    return (
        training_loader(job.splits.train, batch_size=job.recipe.batch_size, seed=job.seed, **placing),
        evaluation_loader(job.splits.test, batch_size=batch_size, **placing),
    )


def evaluation_batch(training_batch: int, image_size: int) -> int:
    """Images in a batch of the evaluation, over all processes as in training; `image_size` is their side in pixels.

    512 of up to 32 x 32 pixels. Of larger ones as many as have so many pixels, or as a batch of the training: what
    that takes, with its gradients, there has been room for.
    """
    return min(EVALUATION_BATCH, max(training_batch, EVALUATION_BATCH * 32**2 // image_size**2))


def make_shuffled_loader(job: Job, fabric: Fabric) -> Loader:
    """The test images in about equal batches, each with all classes in proportion; the same in every run."""
    test = job.splits.test
    batches = -(-len(test) // evaluation_batch(job.recipe.batch_size, job.splits.image_size))
    shuffled = test.select(stratified_order(test.labels, "statistics"))
    return evaluation_loader(shuffled, batch_size=-(-len(test) // batches), **_placing(job, fabric))


def _placing(job: Job, fabric: Fabric) -> dict[str, Any]:
    return {
        "splits": job.splits,
        "device": fabric.device,
        "rank": fabric.global_rank,
        "world_size": fabric.world_size,
        "workers": job.compute.workers,
        "channels_last": job.compute.channels_last,
    }


def make_record(job: Job, position: Position, kernels: str, divergence: str | None) -> Record:
    """The record of a run that has ended."""
    rows, fingerprint = position.rows, job.splits.fingerprint
    return Record(
        folder=job.folder,
        status="diverged" if divergence else "finished",
        dataset=job.cell.dataset,
        backbone=job.cell.backbone,
        norm=job.cell.norm,
        recipe=job.cell.recipe,
        seed=job.cell.seed,
        label=job.splits.label,
        baseline=job.splits.baseline,
        precision=job.compute.precision,
        kernels=kernels,
        hash=hash_identity(job.identity),
        identity=job.identity,
        epochs=job.recipe.epochs,
        updates=int(rows[-1]["step"] or 0) if rows else 0,
        train_images=len(job.splits.train),
        test_images=len(job.splits.test),
        parameters=sum(p.numel() for p in job.model.parameters()),
        norm_layers=len(job.norm_layers),
        last=rows[-1] if rows else {},
        best=max(rows, key=lambda row: row["test/top1"] or 0.0) if rows else {},
        seconds=sum(row["seconds"] or 0.0 for row in rows),
        divergence=divergence,
        images=Images(files=fingerprint.files, pixels=fingerprint.pixels),
    )
