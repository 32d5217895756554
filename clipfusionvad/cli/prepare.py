"""What training and testing both need before they start."""

from __future__ import annotations

import importlib
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from tqdm import tqdm

from clipfusionvad.cli.options import NO_TRUTH, Parser, parse_options
from clipfusionvad.data.checks import check_features
from clipfusionvad.data.features import load_entry
from clipfusionvad.data.lists import Entry, add_streams, read_list
from clipfusionvad.data.packed.store import FEATURES, Store, open_store, store_folder
from clipfusionvad.data.truth import read_truth
from clipfusionvad.datasets import DATASETS, Dataset, find_dataset
from clipfusionvad.engine.checkpoint import ModelFile, load_centroid
from clipfusionvad.engine.evaluator import VideoSet
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.provenance import CRC, Sources, environment
from clipfusionvad.models import Method, build_method, find_method, method_names
from clipfusionvad.models.clip import ClipWeights, clip_in_checkpoint, load_clip


class OptionFile(Protocol):
    """What ``ucf_option.py`` and its like offer."""

    DATASET: Dataset

    def parse_args(self, argv: Sequence[str] | None = None, stored: Mapping[str, Any] | None = None) -> Namespace: ...


class GeneralOptions:
    """Stands for the option file of a dataset that has none."""

    def __init__(self, dataset: Dataset):
        self.DATASET = dataset

    def parse_args(self, argv: Sequence[str] | None = None, stored: Mapping[str, Any] | None = None) -> Namespace:
        return parse_options(argv, self.DATASET, _general_defaults(self.DATASET), stored)


def _general_defaults(dataset: Dataset) -> dict[str, Any]:
    """The lines of an option file for a dataset that has none."""
    lists, truth = dataset.list_files, dataset.truth_files
    return {
        "seed": 234,
        "method": "clipfusionvad",
        "classes_num": len(dataset.classes),
        "embed_dim": 512,
        "visual_width": 512,
        "max_epoch": 10,
        "batch_size": 64,
        "balanced": True,
        "lr": 2e-5,
        "scheduler_rate": 0.1,
        "scheduler_milestones": [4, 8],
        "eval_every": 0,
        "select": "auc1",
        "model_path": f"model/model_{dataset.name}.pth",
        "checkpoint_path": f"model/checkpoint_{dataset.name}.pth",
        "train_list": f"list/{lists['train']}",
        "test_list": f"list/{lists['test']}",
        "gt_path": f"list/{truth['frames']}",
        "gt_segment_path": f"list/{truth['segments']}",
        "gt_label_path": f"list/{truth['labels']}",
    }


def find_option_file(command: str, argv: Sequence[str]) -> tuple[OptionFile, list[str]]:
    """The option file of the dataset that ``--dataset`` names, and the rest of the command line."""
    parser = Parser(
        prog=f"clipfusionvad {command}",
        usage="%(prog)s --dataset NAME [options]",
        description=f"Defaults differ by dataset, options by method ({', '.join(method_names())}): "
        f"with --dataset and --method, --help lists them all.",
        add_help=False,
    )
    names = f"{', '.join(DATASETS)}, or a YAML file of your own"
    parser.add_argument("--dataset", metavar="NAME", help=names)
    known, rest = parser.parse_known_args(argv)
    if known.dataset is None and {"-h", "--help"} & set(rest):
        parser.print_help()
        sys.exit(0)
    if known.dataset is None:
        parser.error(f"--dataset is needed, one of: {names}; with it, --help lists all options")
    return option_file_of(find_dataset(known.dataset)), rest


def option_file_of(dataset: Dataset) -> OptionFile:
    name = f"{dataset.name}_option"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
    return GeneralOptions(dataset)


def open_list(args: Namespace, path: str, dataset: Dataset, training: bool = False) -> tuple[list[Entry], Store | None]:
    """A list's entries, and its packed features where there are some and they may be used.

    ``training`` takes samples of videos, where the method always makes the same; else whole videos are wanted.
    """
    folder = store_folder(path, args.packed_dir)
    if not (args.packed and folder.is_dir()):
        return read_entries(args, path, dataset), None
    method = find_method(args.method)
    store = open_store(folder)
    store.check_fit(path, method.streams, args.visual_width, method.sampling_of(vars(args)) if training else None)
    entries = read_entries(args, path, dataset, may_lack_files=True)
    store.check_sources(entries)
    print(f"features of {path} from {folder}")
    return store.attach(entries), store


def read_entries(args: Namespace, path: str, dataset: Dataset, may_lack_files: bool = False) -> list[Entry]:
    """A list's entries, with the files of all streams that the method reads."""
    entries = read_list(path, args.feature_root, dataset, may_lack_files)
    streams = find_method(args.method).streams
    if len(streams) == 1:
        return entries
    if len(args.stream_folders) != len(streams):
        raise UserError(f"--stream-folders takes {len(streams)} words, for {', '.join(streams)}")
    return add_streams(entries, args.stream_folders, path, may_lack_files)


def check_list(
    args: Namespace, path: str, part: str, entries: Sequence[Entry], store: Store | None, sources: Sources
) -> list[int]:
    """Check a list's features and note in ``sources`` what they are made of; the snippets of each video."""
    if store is None:
        note = sources.reader(part, read=args.check)
        return check_features(entries, args.visual_width, path, read=args.check, note=note)
    sources.add(part, store.folder / FEATURES, f"{CRC}{store.manifest.crc32:08x}")
    return store.lengths.tolist()


def prepare_test_set(args: Namespace, dataset: Dataset, sources: Sources | None = None) -> VideoSet:
    """Read and check the test list, its features and its truth, if there is one; ``sources`` is told of them."""
    entries, store = open_list(args, args.test_list, dataset)
    snippets = check_list(args, args.test_list, "test features", entries, store, sources or Sources())
    truth = None
    if args.gt_path != NO_TRUTH:
        truth_paths = (args.gt_path, args.gt_segment_path, args.gt_label_path)
        truth = read_truth(*truth_paths, entries, snippets, dataset, args.frames_per_snippet)
    return VideoSet(entries, dataset, args.visual_width, truth, args.frames_per_snippet)


def about(made: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The environment of a result, with the CLIP of a model that ``made`` describes."""
    return environment(device) | {"clip": made["clip"], "clip_fingerprint": made["clip_fingerprint"]}


def prepare_model(
    args: Namespace, dataset: Dataset, file: ModelFile | None = None, clip: ClipWeights | None = None
) -> tuple[Method, ClipWeights | None]:
    """Build the model that the options describe, with ``clip``, else the CLIP inside a model file or of ``--clip``."""
    method = find_method(args.method)
    if method.needs_clip and clip is None:
        clip = clip_in_checkpoint(file.state, file.path) if file else None
        clip = clip or load_clip(args.clip, width=args.embed_dim)
    torch.manual_seed(args.seed)
    options = {name: getattr(args, name) for name in method.option_names()}
    return build_method(args.method, dataset.prompts, clip, **options), clip


def find_normal_centroid(model: Method, args: Namespace, entries: Sequence[Entry], dataset: Dataset) -> None:
    """Fill a model's normal centroid from ``--normal-centroid``, else from the normal videos of ``entries``."""
    if model.has_normal_centroid:
        return
    if args.normal_centroid:
        load_centroid(model, args.normal_centroid)
        return
    normal = [entry for entry in entries if dataset.is_normal(entry.label)]
    if not normal:
        raise UserError(f"{model.name} learns what is normal from normal training videos, but the list has none")
    progress = tqdm(normal, "normal videos", disable=None, leave=False)
    model.set_normal_centroid(load_entry(entry, args.visual_width) for entry in progress)
