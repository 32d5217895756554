"""Test on XD-Violence: python xd_test.py --help"""

import sys

import xd_option
from clipfusionvad.cli.test import test
from clipfusionvad.io.errors import run_main


def main(argv=None):
    return run_main(lambda: test(argv, xd_option))


if __name__ == "__main__":
    sys.exit(main())
