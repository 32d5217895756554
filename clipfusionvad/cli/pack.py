"""Pack the features of a dataset's lists into one file each, which training and testing read many times faster."""

import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from clipfusionvad.cli.option_files import find_option_file
from clipfusionvad.cli.options import settings_of
from clipfusionvad.cli.parser import Parser
from clipfusionvad.data.lists import Entry
from clipfusionvad.data.packed.store import DTYPES, Manifest, Store, open_store, store_folder
from clipfusionvad.data.packed.write import write_store
from clipfusionvad.data.sampling import Sampling
from clipfusionvad.engine.data_setup import read_entries
from clipfusionvad.engine.device import count_cores
from clipfusionvad.io.errors import UserError, warn
from clipfusionvad.models import find_method
from clipfusionvad.models.config import ModelConfig

# More threads would wait for the disk and for the one that writes.
MOST_WORKERS = 8


def main(argv: list[str]) -> int:
    option_file, rest = find_option_file("pack", argv)
    own, rest = _parse_own(rest)
    settings = settings_of(option_file.parse_args(rest), option_file.DATASET)
    data, model = settings.data, settings.model
    if settings.run.demo:
        from clipfusionvad.tools.demo import make_demo

        make_demo(settings.dataset)
    sampling = find_method(model.method).sampling_of(model.options)
    # One list for both is packed whole, which serves both.
    lists = {data.train_list: sampling} | {data.test_list: None}
    # Nothing is packed unless all can be read.
    entries = {path: read_entries(path, settings.dataset, model, data) for path in lists}
    workers = data.workers or min(MOST_WORKERS, count_cores())
    try:
        for path, sampled in lists.items():
            folder = store_folder(path, own.output or data.packed_dir)
            pack_list(folder, path, entries[path], model, sampled, own.dtype, workers)
    except KeyboardInterrupt:
        print("a packed list is kept; the same command continues with the other one", file=sys.stderr)
        raise
    return 0


def _parse_own(argv: Sequence[str]) -> tuple[Namespace, list[str]]:
    """Return the options that training does not have, and the rest of the command line."""
    parser = make_parser()
    if {"-h", "--help"} & set(argv):
        # Those of training follow, from its own parser.
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


def pack_list(
    folder: Path,
    path: str,
    entries: Sequence[Entry],
    model: ModelConfig,
    sampling: Sampling | None,
    dtype: str,
    workers: int,
) -> None:
    """Pack one list into a folder, unless the folder holds the same already; print where it is and its size."""
    streams, start = find_method(model.method).streams, time.perf_counter()
    existing = _find(folder, entries, path, model, sampling, dtype)
    if existing is not None:
        print(f"{folder} is up to date: {_describe(existing.manifest, folder)}")
        return
    made = write_store(folder, entries, path, streams, model.visual_width, sampling, dtype, workers)
    print(f"{folder}: {_describe(made, folder)}, packed in {time.perf_counter() - start:.1f} s")


def _find(
    folder: Path, entries: Sequence[Entry], path: str, model: ModelConfig, sampling: Sampling | None, dtype: str
) -> Store | None:
    """Return the store that packing would write, if it exists and is undamaged."""
    if not folder.exists():
        return None
    try:
        store = open_store(folder)
        store.check_fit(path, find_method(model.method).streams, model.visual_width, sampling)
        store.check_sources(entries)
        store.check_data()
    except UserError as error:
        warn(f"{error} (that is done now)")
        return None
    whole = sampling is None or sampling.is_random
    return store if store.manifest.dtype == dtype and store.whole == whole else None


def _describe(made: Manifest, folder: Path) -> str:
    size = sum(file.stat().st_size for file in folder.iterdir())
    what = "whole videos" if made.sampling is None else f"inputs of {made.sampling}"
    rounded = f"rounded by at most {made.rounding:.1e} of a snippet's largest value" if made.rounding else "exact"
    return f"{made.videos} {what}, {made.dtype} ({rounded}), {size / 1e6:.1f} MB"
