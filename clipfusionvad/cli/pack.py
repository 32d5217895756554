"""Pack the features of a dataset's lists into one file each, which training and testing read many times faster."""

import sys
import time
from pathlib import Path

from clipfusionvad.cli.options import find_option_file, settings_of
from clipfusionvad.cli.parser import Parser
from clipfusionvad.data.packed import DTYPES, Manifest, open_store, store_folder, write_store
from clipfusionvad.data.sampling import Sampling
from clipfusionvad.engine.device import count_cores
from clipfusionvad.engine.setup import read_entries
from clipfusionvad.io.errors import UserError, warn
from clipfusionvad.models import find_method

# More threads would wait for the disk and for the one that writes.
MOST_WORKERS = 8


def make_parser() -> Parser:
    """Return the parser of the options that training does not have."""
    parser = Parser(prog="clipfusionvad pack", description=__doc__, add_help=False, usage="%(prog)s [options]")
    group = parser.add_argument_group("packing")
    group.add_argument("--output", metavar="DIR", help="folder for the packed lists (default: beside the lists)")
    group.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="float32 keeps float32 features exact")
    return parser


def main(argv: list[str]) -> int:
    option_file, rest = find_option_file("pack", argv)
    parser = make_parser()
    if {"-h", "--help"} & set(rest):
        # Those of training follow, from its own parser.
        print(parser.format_help())
    own, rest = parser.parse_known_args(rest)
    settings = settings_of(option_file.parse_args(rest), option_file.DATASET)
    data, model = settings.data, settings.model
    if settings.run.demo:
        from clipfusionvad.tools.demo import make_demo

        make_demo(settings.dataset)
    method = find_method(model.method)
    # One list for both is packed whole, which serves both.
    lists = {data.train_list: method.sampling_of(model.options)} | {data.test_list: None}
    # Nothing is packed unless all can be read.
    read = {path: read_entries(path, settings.dataset, model, data) for path in lists}
    try:
        for path, sampling in lists.items():
            folder, entries, start = store_folder(path, own.output or data.packed_dir), read[path], time.perf_counter()
            fit = path, method.streams, model.feature_width, sampling
            if folder.exists():
                try:
                    store = open_store(folder)
                    store.check_fit(*fit)
                    store.check_sources(entries)
                    store.check_data()
                    if (store.manifest.dtype, store.whole) == (own.dtype, sampling is None or sampling.is_random):
                        print(f"{folder} is up to date: {_describe(store.manifest, folder, sampling)}")
                        continue
                except UserError as error:
                    warn(f"{error} (packing again now)")
            made = write_store(folder, entries, *fit, own.dtype, data.workers or min(MOST_WORKERS, count_cores()))
            print(f"{folder}: {_describe(made, folder, sampling)}, packed in {time.perf_counter() - start:.1f} s")
    except KeyboardInterrupt:
        print("a packed list is kept; the same command continues with the other one", file=sys.stderr)
        raise
    return 0


def _describe(made: Manifest, folder: Path, sampling: Sampling | None) -> str:
    size = sum(file.stat().st_size for file in folder.iterdir())
    what = f"inputs of {sampling.length} snippets" if sampling and made.sampling else "whole videos"
    rounded = f"rounded by at most {made.rounding:.1e} of a snippet's largest value" if made.rounding else "exact"
    return f"{made.videos} {what}, {made.dtype} ({rounded}), {size / 1e6:.1f} MB"
