"""Runs the fuzzing in worker processes and prints a table: ``python tests/helpers/fuzz/run.py`` (``make fuzz``).

A case is decided by its target, its number and the seed, so that it can be repeated:
``python tests/helpers/fuzz/run.py --seed 1 --kind features --case 17``.
"""

import argparse
import faulthandler
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import repeat
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

from clipfusionvad.io.errors import UserError, error_line  # noqa: E402
from fuzz.seeds import make_seeds  # noqa: E402
from fuzz.targets import OUTCOMES, REFUSED, TARGETS, Case  # noqa: E402

SECONDS = 10
# A worker that does not answer its alarm hangs in a library, and ends itself.
PATIENCE = 30
# Memory of a worker: what asks for more has to be refused, not to bring the machine down.
MEMORY = 8 * 2**30
FAILED = "failed"


class Hang(BaseException):
    """Raised by the alarm; nothing catches it."""


def _ring(*_: object) -> None:
    raise Hang(f"hangs for more than {SECONDS} s")


def run_case(kind: str, number: int, seed: int, seeds: Path, work: Path) -> tuple[str, str]:
    """Return the outcome of one case, or ``FAILED`` and the reason with the last places in the package."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    here, handler = os.getcwd(), signal.signal(signal.SIGALRM, _ring)
    os.chdir(work)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    try:
        outcome = TARGETS[kind][0](Case(random.Random(f"{seed}/{kind}/{number}"), work, seeds))
        return (outcome, "") if outcome in OUTCOMES else (FAILED, f"no outcome: {outcome!r}")
    except UserError as error:
        line = error_line(error)
        clear = line.isprintable() and len(line) <= 5000
        return (REFUSED, "") if clear else (FAILED, f"no clear line: {line[:300]!r}")
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames if "clipfusionvad" in f.filename]
        places = " < ".join([f"{frames[-1].filename}:{frames[-1].lineno}", *reversed(own[-3:])])
        return FAILED, f"{type(error).__name__}: {str(error)[:600]} [{places}]"
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        os.chdir(here)


def _start_worker() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    # Discard what libraries print.
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)


def run_kind(kind: str, count: int, seed: int, folder: Path) -> list[tuple[str, str]]:
    """Run the cases of one target in a process, which is started again after a case that kills it."""
    found: list[tuple[str, str]] = []
    while len(found) < count:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _start_worker) as pool:
            try:
                while len(found) < count:
                    case = pool.submit(run_case, kind, len(found), seed, folder / "seeds", folder / kind)
                    found.append(case.result())
            except BrokenProcessPool:
                found.append((FAILED, "the process died"))
    return found


def report(found: dict[str, list[tuple[str, str]]], seed: int) -> tuple[list[str], str]:
    """Return a line for each failure, which begins with the options that repeat it, and the table of outcomes."""
    cases = [(kind, *case, number) for kind, outcomes in found.items() for number, case in enumerate(outcomes)]
    lines = [f"--seed {seed} --kind {kind} --case {at}: {why}" for kind, end, why, at in cases if end == FAILED]
    kinds, ends, *_ = map(np.array, zip(*cases, strict=True))
    table = pd.crosstab(kinds, ends, margins=True, margins_name="all")
    return lines, table.reindex(columns=["all", *OUTCOMES, FAILED], fill_value=0).to_string(index_names=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=24000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--kind", action="append", choices=list(TARGETS))
    parser.add_argument("--case", type=int, help="this one case of --kind, in this process")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as temporary:
        folder, start = Path(temporary), time.monotonic()
        make_seeds(folder / "seeds")
        if args.case is not None:
            print(*run_case(args.kind[0], args.case, args.seed, folder / "seeds", folder / "work"))
            return 0
        weights = {kind: TARGETS[kind][1] for kind in args.kind or TARGETS}
        counts = [-(-args.cases * weight // sum(weights.values())) for weight in weights.values()]
        with ThreadPoolExecutor(args.workers) as pool:
            found = pool.map(run_kind, weights, counts, repeat(args.seed), repeat(folder))
            failures, table = report(dict(zip(weights, found, strict=True)), args.seed)
    print("\n".join([*failures, table, f"{time.monotonic() - start:.0f} s, seed {args.seed}"]))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
