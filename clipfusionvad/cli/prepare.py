"""What training and testing both need before they start."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tqdm import tqdm

from clipfusionvad.data.checks import check_features
from clipfusionvad.data.config import NO_TRUTH
from clipfusionvad.data.features import load_entry
from clipfusionvad.data.lists import Entry, add_streams, read_list
from clipfusionvad.data.packed.store import FEATURES, Store, open_store, store_folder
from clipfusionvad.data.truth import read_truth
from clipfusionvad.datasets import Dataset
from clipfusionvad.engine.checkpoint import ModelFile, load_centroid
from clipfusionvad.engine.evaluator import VideoDataset
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.provenance import CRC, Sources, environment
from clipfusionvad.models import Method, build_method, find_method
from clipfusionvad.models.clip import ClipWeights, clip_in_checkpoint, load_clip


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


def prepare_test_set(args: Namespace, dataset: Dataset, sources: Sources | None = None) -> VideoDataset:
    """Read and check the test list, its features and its truth, if there is one; ``sources`` is told of them."""
    entries, store = open_list(args, args.test_list, dataset)
    snippets = check_list(args, args.test_list, "test features", entries, store, sources or Sources())
    truth = None
    if args.gt_path != NO_TRUTH:
        truth_paths = (args.gt_path, args.gt_segment_path, args.gt_label_path)
        truth = read_truth(*truth_paths, entries, snippets, dataset, args.frames_per_snippet)
    return VideoDataset(entries, dataset, args.visual_width, truth, args.frames_per_snippet)


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
