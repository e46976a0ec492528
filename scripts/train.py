"""Train one run, or a sweep with -m: python scripts/train.py dataset=cifar10 backbone=resnet20 norm=l2bn seed=0."""

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from l2bn.errors import optional_output, told_plainly


@hydra.main(version_base="1.3", config_path="../configs", config_name="train")
def main(config: DictConfig) -> None:
    from l2bn.training.command import train_from_hydra  # imported here: --help need not wait for torch

    train_from_hydra(config, HydraConfig.get().runtime.choices)


if __name__ == "__main__":
    with optional_output(), told_plainly():
        from l2bn.training.interruption import refuse_copies  # needs a POSIX system, and says so

        refuse_copies()
        main()
