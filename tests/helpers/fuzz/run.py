"""Runs the fuzzing in worker processes and prints a table: ``python tests/helpers/fuzz/run.py`` (``make fuzz``).

A case is decided by its kind, its number and the seed alone, so that any of them can be repeated:
``python tests/helpers/fuzz/run.py --seed 1 --kind features --case 17``.
"""

import argparse
import faulthandler
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

from fuzz import data, models, options, results  # noqa: E402
from fuzz.case import OUTCOMES, Case  # noqa: E402
from fuzz.seeds import make_seeds  # noqa: E402

SECONDS = 10
# A worker that does not answer its alarm hangs in a library, and ends itself.
PATIENCE = 30
# Memory of a worker: what asks for more has to be refused, not to bring the machine down.
MEMORY = 8 * 2**30


@dataclass(frozen=True)
class Kind:
    """``run`` gives one of ``case.OUTCOMES``, or raises."""

    title: str
    weight: int
    run: Callable[[Case], str]


KINDS = {
    "features": Kind("features (.npy)", 30, data.features),
    "lists": Kind("lists (CSV)", 25, data.lists),
    "annotations": Kind("annotations", 30, data.annotations),
    "truth_arrays": Kind("truth arrays (.npy)", 25, data.truth_arrays),
    "truth_file": Kind("truth files (CSV, JSON)", 20, data.truth_file),
    "stores": Kind("packed stores", 20, data.stores),
    "configs": Kind("configs (YAML)", 25, options.configs),
    "dataset_files": Kind("dataset files (YAML)", 15, options.dataset_files),
    "models": Kind("model files of ours", 20, models.own),
    "safetensors": Kind("model files, safetensors", 20, models.safetensors),
    "contents": Kind("model files, their content", 20, models.contents),
    "released": Kind("model files, released", 20, models.released),
    "lightning": Kind("Lightning checkpoints", 10, models.lightning),
    "clips": Kind("CLIP files", 8, models.clips),
    "resumed": Kind("training states", 5, models.resumed),
    "runs": Kind("run folders", 15, results.run_folders),
    "scores": Kind("scores (.npz)", 15, results.scores),
    "manifests": Kind("feature manifests", 20, results.manifests),
    "descriptions": Kind("detections (JSON)", 10, results.descriptions),
    "videos": Kind("videos", 30, data.frames),
    "extractions": Kind("videos, extracted", 3, data.extraction),
    "flags": Kind("command lines, parsed", 30, options.parsed),
    "commands": Kind("command lines, run", 12, options.ran),
}


class Hang(BaseException):
    """Raised by the alarm; nothing catches it."""


def run_case(kind: str, number: int, seed: int, seeds: Path, work: Path) -> tuple[str, str]:
    """The outcome of one case, "failed" with a reason where it is none of ``OUTCOMES``."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    case = Case(random.Random(f"{seed}/{kind}/{number}"), work, seeds)
    signal.signal(signal.SIGALRM, _ring)
    here = os.getcwd()
    os.chdir(work)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        outcome = KINDS[kind].run(case)
        return (outcome, "") if outcome in OUTCOMES else ("failed", f"no outcome: {outcome!r}")
    except Hang:
        return "failed", f"hangs for more than {SECONDS} s: " + _where()
    except BaseException as error:
        return "failed", f"{type(error).__name__}: {str(error)[:600]}" + _where()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.chdir(here)


def _ring(number: int, frame: object) -> None:
    raise Hang


def _where() -> str:
    """The last places in the package that an exception went through."""
    frames = traceback.extract_tb(sys.exc_info()[2])
    own = [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames if "clipfusionvad" in f.filename]
    last = f"{Path(frames[-1].filename).name}:{frames[-1].lineno} {frames[-1].name}"
    return f" [{' < '.join(reversed(own[-3:]))}; {last}]"


def counts_of(cases: int, kinds: list[str]) -> dict[str, int]:
    """Cases of each kind, by their weights."""
    total = sum(KINDS[kind].weight for kind in kinds)
    return {kind: max(1, round(cases * KINDS[kind].weight / total)) for kind in kinds}


def work_off(args: argparse.Namespace) -> None:
    """A worker: run the cases of one kind from number ``--case`` on and print a line for each."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    answers = os.fdopen(os.dup(1), "w")
    # Discard what libraries print.
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    for number in range(args.case, args.cases):
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
        outcome, reason = run_case(args.kind[0], number, args.seed, args.seeds, args.work)
        print(outcome, " ".join(reason.split()), file=answers, flush=True)


def run_kind(args: argparse.Namespace, folder: Path, kind: str, count: int) -> list[tuple[str, str]]:
    """Run the cases of one kind in a process, which is started again after a case that kills it."""
    found: list[tuple[str, str]] = []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    while len(found) < count:
        paths = ["--seeds", folder / "seeds", "--work", folder / f"work_{kind}"]
        cases = ["--seed", args.seed, "--kind", kind, "--case", len(found), "--cases", count]
        command = list(map(str, [sys.executable, __file__, "--worker", *cases, *paths]))
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        with subprocess.Popen(command, text=True, env=environment, **pipes) as process:
            for line in process.stdout:
                outcome, _, reason = line.rstrip("\n").partition(" ")
                found.append((outcome, reason))
        if len(found) < count:
            found.append(("failed", f"the process died with code {process.returncode}"))
    return found


def run_all(args: argparse.Namespace, folder: Path) -> tuple[dict[str, Counter], list[str]]:
    counts = counts_of(args.cases, args.kind or list(KINDS))
    with ThreadPoolExecutor(args.workers) as pool:
        found = pool.map(lambda item: run_kind(args, folder, *item), counts.items())
        results = dict(zip(counts, found, strict=True))
    failures = [
        f"--seed {args.seed} --kind {kind} --case {number}: {reason}"
        for kind, outcomes in results.items()
        for number, (outcome, reason) in enumerate(outcomes)
        if outcome == "failed"
    ]
    return {kind: Counter(outcome for outcome, _ in outcomes) for kind, outcomes in results.items()}, failures


def table_text(table: dict[str, Counter]) -> str:
    rows = {KINDS[kind].title: found for kind, found in table.items()}
    frame = pd.DataFrame.from_dict(rows, orient="index").reindex(columns=[*OUTCOMES, "failed"]).fillna(0).astype(int)
    frame.loc["all"] = frame.sum()
    frame.insert(0, "cases", frame.sum(axis=1))
    return frame.to_string()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=24000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--kind", action="append", choices=list(KINDS))
    parser.add_argument("--case", type=int, help="this one case of --kind, in this process")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--seeds", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work_off(args)
        return 0
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        make_seeds(folder / "seeds")
        if args.case is not None:
            print(*run_case(args.kind[0], args.case, args.seed, folder / "seeds", folder / "work"))
            return 0
        start = time.monotonic()
        table, failures = run_all(args, folder)
        print("\n".join([*failures, table_text(table), f"{time.monotonic() - start:.0f} s, seed {args.seed}"]))
        return 1 if failures else 0
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
