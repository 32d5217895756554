"""Train on XD-Violence: python xd_train.py --help"""

import sys

import xd_option
from clipfusionvad.cli.train import train
from clipfusionvad.io.errors import run_main


def main(argv=None):
    return run_main(lambda: train(xd_option.parse_args(argv), xd_option.DATASET))


if __name__ == "__main__":
    sys.exit(main())
