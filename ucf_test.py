"""Test on UCF-Crime: python ucf_test.py --help"""

import sys

import ucf_option
from clipfusionvad.cli.test import test
from clipfusionvad.io.errors import run_main


def main(argv=None):
    return run_main(lambda: test(argv, ucf_option))


if __name__ == "__main__":
    sys.exit(main())
