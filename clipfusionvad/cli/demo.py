"""Generate a small dataset of a benchmark's shape, train and test on it, and print the result."""

from pathlib import Path

from clipfusionvad.cli.options import option_file_of
from clipfusionvad.cli.parser import Parser
from clipfusionvad.cli.test import test
from clipfusionvad.cli.train import train
from clipfusionvad.datasets import DATASETS, Dataset, find_dataset
from clipfusionvad.engine.run_folder import BEST, states_in
from clipfusionvad.models import method_names
from clipfusionvad.tools.demo import demo_folder


def main(argv: list[str]) -> int:
    args = make_parser().parse_args(argv)

    dataset = find_dataset(args.dataset)
    folder, run = demo_folder(dataset), demo_run(args.method, dataset)
    if (run / "metrics.json").exists():
        print(f"trained already: testing the model; delete {run} to train again, also after a change of the code")
    code = run_demo(args.method, dataset)
    if code == 0:
        print(f"data          {folder}: features/, annotations.csv, list/")
        command = f"python -m clipfusionvad train --dataset {args.dataset} --help"
        print(f"next          see {run}/report.html; then: {command}")
    return code


def make_parser() -> Parser:
    parser = Parser(prog="clipfusionvad demo", description=__doc__)
    names = list(DATASETS)
    parser.add_argument("--dataset", choices=names, default=names[0], help="benchmark whose shape the data has")
    parser.add_argument("--method", choices=method_names(), default="clipfusionvad", help="detector")
    return parser


def demo_run(method: str, dataset: Dataset) -> Path:
    """Return the run folder of a method's demo."""
    return demo_folder(dataset) / f"run_{method}"


def run_demo(method: str, dataset: Dataset) -> int:
    """Train a method on a dataset's demo data, or test the model if it is trained; return the exit code."""
    option_file, run = option_file_of(dataset), demo_run(method, dataset)
    options = ["--demo", "--method", method, "--output-dir", str(run)]
    if (run / "metrics.json").exists():
        return test([*options, "--model-path", str(run / BEST)], option_file)
    resume = ["--use-checkpoint"] if states_in(run) else []
    return train(option_file.parse_args([*options, *resume]), dataset, "repeat the command")
