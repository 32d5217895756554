"""Train on UCF-Crime: python ucf_train.py --help"""

import sys

import ucf_option
from clipfusionvad.cli.train import train
from clipfusionvad.io.errors import run_main


def main(argv=None):
    return run_main(lambda: train(ucf_option.parse_args(argv), ucf_option.DATASET))


if __name__ == "__main__":
    sys.exit(main())
