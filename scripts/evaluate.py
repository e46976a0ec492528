"""Evaluate the last weights of a run on its test images: python scripts/evaluate.py RUN."""

import argparse
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description="Evaluate a run's last weights on its test images.")
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a run")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    parser.add_argument("--root", help="where the data set lies, if not where it lay in training")
    arguments = parser.parse_args()
    from l2bn.errors import UserError
    from l2bn.training.run import evaluate_run  # imported here: --help need not wait for torch

    try:
        loss, top1, top5 = evaluate_run(arguments.run, device=arguments.device, root=arguments.root)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"test loss {loss:.4f}  top-1 {top1:.2f} %" + (f"  top-5 {top5:.2f} %" if top5 is not None else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
