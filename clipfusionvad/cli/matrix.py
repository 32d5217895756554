"""Train and test every method on the demo data of every dataset, and write the table."""

import contextlib
import json
import time
from pathlib import Path

from tqdm import tqdm

from clipfusionvad.cli.demo import demo_run, run_demo
from clipfusionvad.cli.parser import Parser
from clipfusionvad.datasets import DATASETS, Dataset, find_dataset
from clipfusionvad.io.errors import warn
from clipfusionvad.io.files import write_text
from clipfusionvad.models import method_names
from clipfusionvad.tools.demo import FOLDER
from clipfusionvad.tools.tables.matrix import DemoResult, matrix_table, matrix_text


def main(argv: list[str]) -> int:
    args = make_parser().parse_args(argv)

    pairs = [(method, find_dataset(name)) for method in args.methods for name in args.datasets]
    results = []
    for method, dataset in (bar := tqdm(pairs, "matrix", disable=None)):
        bar.set_postfix_str(f"{method} on {dataset.title}")
        results.append(_run_pair(method, dataset))
        print(results[-1].line(), flush=True)
    text = matrix_text(results)
    write_text(args.output / "matrix.md", text)
    write_text(args.output / "matrix.csv", matrix_table(results).to_csv(index=False))
    print(f"\n{text}\nwritten to {args.output}: matrix.md, matrix.csv; the runs: {FOLDER}/DATASET/run_METHOD")
    return 0 if all(result.learned for result in results) else 1


def make_parser() -> Parser:
    parser = Parser(prog="clipfusionvad matrix", description=__doc__)
    parser.add_argument("--methods", nargs="+", choices=method_names(), default=method_names())
    parser.add_argument("--datasets", nargs="+", choices=list(DATASETS), default=list(DATASETS))
    parser.add_argument("--output", type=Path, default=FOLDER, metavar="DIR", help="folder of matrix.csv and matrix.md")
    return parser


def _run_pair(method: str, dataset: Dataset) -> DemoResult:
    """Train, unless the run exists, and test; what both print is written to ``matrix.log`` in the run's folder."""
    run, start = demo_run(method, dataset), time.perf_counter()
    run.mkdir(parents=True, exist_ok=True)
    with open(run / "matrix.log", "w", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        trained = (run / "metrics.json").exists() or run_demo(method, dataset) == 0
        if not trained or run_demo(method, dataset) != 0:
            # A training that was stopped by a signal has saved its state and returned.
            warn(f"stopped at {method} on {dataset.title}; the same command continues from there")
            raise KeyboardInterrupt
    results = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    import pandas as pd

    losses = pd.read_csv(run / "losses.csv").groupby("epoch")["loss"].mean()
    seconds = time.perf_counter() - start
    return DemoResult(method, dataset, losses.iloc[0], losses.iloc[-1], results["untrained"], results["best"], seconds)
