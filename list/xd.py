"""Build the lists and the ground truth of XD-Violence: python list/xd.py --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout that is not installed

from clipfusionvad.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["lists", "--dataset", "xd", *sys.argv[1:]]))
