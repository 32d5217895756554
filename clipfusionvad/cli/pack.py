"""Pack the features of a dataset's lists into one file each, which training and testing read many times faster."""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from clipfusionvad.cli.option_files import find_option_file
from clipfusionvad.cli.parser import Parser
from clipfusionvad.cli.prepare import read_entries
from clipfusionvad.data.lists import Entry
from clipfusionvad.data.packed.store import DTYPES, Manifest, Store, open_store, store_folder
from clipfusionvad.data.packed.write import write_store
from clipfusionvad.data.sampling import Sampling
from clipfusionvad.engine.device import count_cores
from clipfusionvad.io.errors import UserError, warn
from clipfusionvad.models import find_method
from clipfusionvad.tools.demo import make_demo

# More threads than this wait for the disk and for the one that writes.
MOST_WORKERS = 8


def main(argv: list[str]) -> int:
    option_file, rest = find_option_file("pack", argv)
    own, rest = _parse_own(rest)
    args = option_file.parse_args(rest)
    args.packed_dir = own.output or args.packed_dir
    if args.demo:
        make_demo(option_file.DATASET)
    sampling = find_method(args.method).sampling_of(vars(args))
    # One list for both is packed whole, which serves both.
    lists = {args.train_list: sampling} | {args.test_list: None}
    # Nothing is packed unless all can be read.
    entries = {path: read_entries(args, path, option_file.DATASET) for path in lists}
    try:
        for path, how in lists.items():
            pack_list(args, path, entries[path], how, own.dtype)
    except KeyboardInterrupt:
        print("a list that is packed is kept; the same command goes on with what is left", file=sys.stderr)
        raise
    return 0


def _parse_own(argv: Sequence[str]) -> tuple[Namespace, list[str]]:
    """The options that training does not have, and the rest."""
    parser = make_parser()
    if {"-h", "--help"} & set(argv):
        # Those of training follow, from its own parser; its --train-list, --test-list and --method are what counts.
        print(parser.format_help())
    return parser.parse_known_args(argv)


def make_parser() -> Parser:
    parser = Parser(prog="clipfusionvad pack", description=__doc__, add_help=False, usage="%(prog)s [options]")
    group = parser.add_argument_group("packing")
    group.add_argument("--output", metavar="DIR", help="folder for the packed lists (default: beside the lists)")
    group.add_argument(
        "--dtype", choices=DTYPES, default=DTYPES[0], help="float32 keeps the features of a float32 extraction exact"
    )
    return parser


def pack_list(args: Namespace, path: str, entries: Sequence[Entry], sampling: Sampling | None, dtype: str) -> None:
    """Pack one list, unless it is packed already just so and undamaged; say where it is and what it is worth."""
    folder, streams = store_folder(path, args.packed_dir), find_method(args.method).streams
    start = time.perf_counter()
    there = _find(folder, entries, path, streams, args.visual_width, sampling, dtype)
    if there is not None:
        print(f"{folder} is there already and as it should be: {_describe(there.manifest, folder)}")
        return
    workers = args.workers or min(MOST_WORKERS, count_cores())
    made = write_store(folder, entries, path, streams, args.visual_width, sampling, dtype, workers)
    print(f"{folder}: {_describe(made, folder)}, packed in {time.perf_counter() - start:.1f} s")


def _find(
    folder: Path,
    entries: Sequence[Entry],
    path: str,
    streams: Sequence[str],
    width: int,
    sampling: Sampling | None,
    dtype: str,
) -> Store | None:
    """The store that packing would make, if it is there."""
    whole = sampling is None or sampling.is_random
    if not folder.exists():
        return None
    try:
        store = open_store(folder)
        store.check_fit(path, streams, width, sampling)
        store.check_sources(entries)
        store.check_data()
    except UserError as error:
        warn(f"{error} (that is done now)")
        return None
    return store if store.manifest.dtype == dtype and store.whole == whole else None


def _describe(made: Manifest, folder: Path) -> str:
    size = sum(file.stat().st_size for file in folder.iterdir())
    what = "whole videos" if made.sampling is None else f"inputs of {made.sampling}"
    rounded = f"rounded by at most {made.rounding:.1e} of a snippet's largest value" if made.rounding else "exact"
    return f"{made.videos} {what}, {made.dtype} ({rounded}), {size / 1e6:.1f} MB"
