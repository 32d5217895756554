"""Make a small benchmark-shaped dataset, train and test on it, and show the result."""

from __future__ import annotations

from clipfusionvad.commands.prepare import find_option_file
from clipfusionvad.commands.test import test
from clipfusionvad.commands.train import train
from clipfusionvad.datasets import DATASETS
from clipfusionvad.demo import demo_folder
from clipfusionvad.models import method_names
from clipfusionvad.options import Parser
from clipfusionvad.runs import LAST


def main(argv: list[str]) -> int:
    parser = Parser(prog="clipfusionvad demo", description=__doc__)
    names = list(DATASETS)
    parser.add_argument("--dataset", choices=names, default=names[0], help="whose shape the data has")
    parser.add_argument("--method", choices=method_names(), help="default: that of the dataset's option file")
    args = parser.parse_args(argv)

    option_file, _ = find_option_file("demo", ["--dataset", args.dataset])
    method = args.method or option_file.DEFAULTS["method"]
    folder = demo_folder(option_file.DATASET)
    run = folder / f"run_{method}"
    options = ["--demo", "--method", method, "--output-dir", str(run)]
    if (run / "metrics.json").exists():
        print(f"data and model are there already (delete {folder} to start over); testing the model")
        code = test(options, option_file)
    else:
        resume = ["--use-checkpoint"] if (run / LAST).exists() else []
        code = train(option_file.parse_args([*options, *resume]), option_file.DATASET)
    if code == 0:
        print(f"data          {folder}: features/, annotations.csv, list/")
        print(f"next          look at {run}/scores.png; then: python {args.dataset}_train.py --help")
    return code
