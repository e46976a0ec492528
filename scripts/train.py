"""Train one run, or a sweep with -m: python scripts/train.py dataset=cifar10 backbone=resnet20 norm=l2bn seed=0."""

import argparse
from pathlib import Path

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from l2bn.errors import UserError, optional_output
from l2bn.failures import exit_with_message

OURS = {"overrides", "run", "multirun", "config_dir"}


def train(config: DictConfig) -> None:
    from l2bn.training.plan import plan_run  # imported here: --help need not wait for torch
    from l2bn.training.run import run

    run(plan_run(config, HydraConfig.get()))


def main() -> None:
    from l2bn.training.instantiate import CONFIGS  # imported here: without a POSIX system the import says so
    from l2bn.training.interruption import refuse_copies
    from l2bn.training.plan import CONFIG_NAME, composing

    refuse_copies()
    # Of Hydra's own --config-dir the last alone would count.
    parser = argparse.ArgumentParser(parents=[get_args_parser()], add_help=False, conflict_handler="resolve")
    parser.add_argument("--config-dir", "-cd", type=Path, action="append", default=[])
    arguments = vars(parser.parse_intermixed_args())
    if any(value for key, value in arguments.items() if key not in OURS):  # --help, --cfg and the like
        if len(arguments["config_dir"]) > 1:
            raise UserError("with --help, --cfg and the like Hydra takes one --config-dir: give only one")
        hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=CONFIG_NAME)(train)()
        return
    with composing(arguments["overrides"], arguments["config_dir"]) as (composer, overrides):
        given = RunMode.MULTIRUN if arguments["multirun"] else composer.get_mode(CONFIG_NAME, overrides)
        mode = given or RunMode.RUN
        start = composer.multirun if mode == RunMode.MULTIRUN else composer.run
        # Relative paths are those of the place where the command was given.
        start(CONFIG_NAME, train, [*overrides, f"hydra.mode={mode.name}", "hydra.job.chdir=false"])


if __name__ == "__main__":
    with optional_output(), exit_with_message():
        main()
