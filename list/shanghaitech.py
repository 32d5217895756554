"""Build the lists and the ground truth of ShanghaiTech: python list/shanghaitech.py --help."""

import sys
from pathlib import Path

# Works from a checkout that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from clipfusionvad.cli.lists import main

if __name__ == "__main__":
    sys.exit(main(["--dataset", "shanghaitech", *sys.argv[1:]]))
