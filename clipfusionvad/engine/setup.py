"""Opens the data and builds the model that the options name, and checks both before anything starts."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from clipfusionvad.data.config import NO_TRUTH, DataConfig
from clipfusionvad.data.conventions import find_convention
from clipfusionvad.data.features import check_features, check_frames, load_entry, recorded_frames
from clipfusionvad.data.lists import Entry, add_streams, check_repeated, crops_of, read_list
from clipfusionvad.data.packed import FEATURES, Store, open_store, store_folder
from clipfusionvad.data.truth import is_keyed, read_truth
from clipfusionvad.datasets import Dataset
from clipfusionvad.engine.checkpoint import ModelFile, check_clip, encode_text, load_centroid, load_model_file
from clipfusionvad.engine.config import Settings
from clipfusionvad.engine.evaluator import VideoDataset
from clipfusionvad.io.errors import UserError, warn
from clipfusionvad.io.foreign_checkpoints import without_prefix
from clipfusionvad.io.progress import ProgressBar
from clipfusionvad.io.provenance import CRC, Sources, environment
from clipfusionvad.models import Method, ModelConfig, TextMethod, build_method, find_method
from clipfusionvad.models.clip import ClipWeights, clip_in_checkpoint, load_clip


def read_entries(
    path: str, dataset: Dataset | None, model: ModelConfig, data: DataConfig, may_lack_files: bool = False
) -> list[Entry]:
    """Return a list's entries, with the files of all streams that the method reads."""
    entries = read_list(path, data.feature_root, dataset, may_lack_files)
    streams = find_method(model.method).streams
    if len(streams) == 1:
        return entries
    folders = data.stream_folders or streams
    if len(folders) != len(streams):
        raise UserError(f"--stream-folders needs {len(streams)} words, one for each of {', '.join(streams)}")
    return add_streams(entries, folders, path, may_lack_files)


def open_list(
    path: str, dataset: Dataset, model: ModelConfig, data: DataConfig, training: bool = False
) -> tuple[list[Entry], Store | None]:
    """Return a list's entries, and its packed features where there are some and they may be used.

    Training needs inputs, so a store of sampled ones serves if they are always the same; a test needs whole videos.
    """
    folder = store_folder(path, data.packed_dir)
    if not (data.packed and folder.is_dir()):
        return read_entries(path, dataset, model, data), None
    method = find_method(model.method)
    store = open_store(folder)
    store.check_fit(path, method.streams, model.feature_width, method.sampling_of(model.options) if training else None)
    entries = read_entries(path, dataset, model, data, may_lack_files=True)
    store.check_sources(entries)
    print(f"features of {path} from {folder}")
    return store.attach(entries), store


def check_list(
    path: str, entries: Sequence[Entry], store: Store | None, width: int, read: bool, part: str, sources: Sources
) -> list[int]:
    """Check a list's features and note them in ``sources`` under ``part``; return the snippets of each video.

    Without ``read`` only their sizes are looked at.
    """
    if store is None:
        return check_features(entries, width, path, read=read, note=sources.reader(part, read=read))
    sources.add(part, store.folder / FEATURES, f"{CRC}{store.manifest.crc32:08x}")
    return store.lengths.tolist()


def check_stride(entries: Sequence[Entry], store: Store | None, used: int | None) -> None:
    """Raise ``UserError`` where features were extracted with another ``--frames-per-snippet`` than the one in use."""
    if used is None:
        return
    paths = [entry.path for entry in entries]
    recorded = recorded_frames(paths)
    if store and store.manifest.frames_per_snippet:
        recorded = dict.fromkeys(paths, store.manifest.frames_per_snippet) | recorded
    check_frames(paths, used, recorded)


def read_test_set(dataset: Dataset, model: ModelConfig, data: DataConfig, noted: Sources | None = None) -> VideoDataset:
    """Read and check the test list, its features and its truth, if there is one; note the files in ``noted``."""
    entries, store = open_list(data.test_list, dataset, model, data)
    check_stride(entries, store, data.stride)
    if data.gt_path != NO_TRUTH and is_keyed(data.gt_path):
        check_repeated(data.test_list, entries)
    noted = noted or Sources()
    snippets = check_list(data.test_list, entries, store, model.feature_width, data.check, "test features", noted)
    crops = None
    if data.test_crops == "all":
        crops = [crops_of(entry) for entry in entries]
        for video in crops:
            if len(video) != len(crops[0]):
                first, other = (f"{own[0].video} has {len(own)}" for own in (crops[0], video))
                raise UserError(
                    f"--test-crops all: {first} crops, but {other}; add the missing files, or remove others"
                )
        flat, rows = [crop for video in crops for crop in video], [n for n, video in enumerate(crops) for _ in video]
        found = check_list(data.test_list, flat, None, model.feature_width, data.check, "test features", noted)
        for crop, row, count in zip(flat, rows, found, strict=True):
            if count != snippets[row]:
                raise UserError(
                    f"--test-crops all: {crop.path} has {count} snippets, but {entries[row].path} has {snippets[row]}"
                )
        print(f"test scores: mean over {len(crops[0])} crops of each video")
    truth = None
    if data.gt_path != NO_TRUTH:
        truth_paths = (data.gt_path, data.gt_segment_path, data.gt_label_path)
        convention = find_convention(dataset, data.convention) if data.convention else None
        truth = read_truth(*truth_paths, entries, snippets, dataset, data.stride, convention=convention)
    elif data.stride is None:
        raise UserError("--gt-path none lacks the frames of the test videos: use --segments fixed, not equal")
    if (kind := absent_kind(entries, dataset)) is not None:
        effect = "AUC and AP cannot be computed"
        if kind == "normal" and truth:
            effect = "AUC and AP are those of the frames of anomalous videos"
        warn(f"{data.test_list} has no {kind} video: {effect}")
    return VideoDataset(entries, dataset, model.feature_width, truth, data.stride, crops)


def absent_kind(entries: Sequence[Entry], dataset: Dataset) -> str | None:
    """Return which kind of videos a list lacks, "normal" or "anomalous", or None."""
    kinds = {dataset.is_normal(entry.label) for entry in entries}
    return None if len(kinds) == 2 else "anomalous" if True in kinds else "normal"


def build_model(
    config: ModelConfig, dataset: Dataset, seed: int, file: ModelFile | None = None, clip: ClipWeights | None = None
) -> tuple[Method, ClipWeights | None]:
    """Build a model and return it with its CLIP: ``clip``, else that inside a checkpoint, else ``config.clip``."""
    if find_method(config.method).needs_clip and clip is None:
        clip = clip_in_checkpoint(file.state, file.path) if file else None
        clip = clip or load_clip(config.clip, width=config.embed_dim)
    torch.manual_seed(seed)
    return build_method(config.method, dataset.prompts, clip, **config.options), clip


def restore_scorer(settings: Settings, file: ModelFile) -> Method:
    """Build the model of a checkpoint for scoring only, on the CPU, with the text features that the file stores."""
    config, prompts, text = settings.model, settings.dataset.prompts, file.text_features
    method = find_method(config.method)
    stored = text is not None and [*file.hparams["classes"].values()] == prompts
    # Some read texts in their losses only.
    if stored or (method.needs_clip and not issubclass(method, TextMethod)):
        model = build_method(config.method, prompts, None, **config.options)
        # What the model lacks are its text encoders.
        load_model_file(model, file, left=file.state.keys() - model.state_dict().keys())
    else:
        if method.needs_clip:
            warn(f"{file.path} stores no text features of these classes: loading CLIP to encode them")
        model, _ = restore_model(settings, file)
        text = encode_text(model) if isinstance(model, TextMethod) else None
    if isinstance(model, TextMethod) and text is not None:
        model.store_text(text)
    return model


def restore_model(settings: Settings, file: ModelFile) -> tuple[Method, ClipWeights | None]:
    """Build the model that the options describe with the weights of a checkpoint, on the CPU."""
    model, clip = build_model(settings.model, settings.dataset, settings.training.seed, file)
    check_clip(file, clip)
    load_model_file(model, file)
    # Released files of some methods lack the normal centroid.
    path, data, entries = settings.run.normal_centroid, settings.data, []
    if not (model.has_normal_centroid or path):
        if not Path(data.train_list).is_file():
            raise UserError(
                f"{file.path} does not hold {', '.join(model.centroid_buffers)}, the mean of the normal training "
                f"videos: give the training list with --train-list, or the file of a run with --normal-centroid"
            )
        entries = open_list(data.train_list, settings.dataset, settings.model, data)[0]
    find_normal_centroid(model, entries, settings.dataset, path)
    return model, clip


def find_normal_centroid(model: Method, entries: Sequence[Entry], dataset: Dataset, path: str | None = None) -> None:
    """Fill a model's normal centroid from a file, else from the normal videos of ``entries``."""
    if model.has_normal_centroid:
        return
    if path:
        load_centroid(model, path)
        return
    normal = [entry for entry in entries if dataset.is_normal(entry.label)]
    if not normal:
        raise UserError(f"{model.name} learns what is normal from normal training videos, but the list has none")
    bar = ProgressBar(normal, "normal videos", leave=False)
    videos = (load_entry(entry, model.feature_width) for entry in bar)
    # With a learned map, the centroid is that of its initial weights.
    model.set_normal_centroid(model.feature_map.map_video(video) if model.feature_map else video for video in videos)


def find_feature_statistics(model: Method, entries: Sequence[Entry]) -> None:
    """Fill mean and deviation of --feature-norm standardize from the training features, unless they are known."""
    if model.feature_map and model.feature_map.lacks_statistics:
        bar = ProgressBar(entries, "feature statistics", leave=False)
        model.feature_map.set_statistics(load_entry(entry, model.feature_width) for entry in bar)


def load_initial_weights(model: Method, settings: Settings, file: ModelFile, clip: ClipWeights | None) -> None:
    """Start from the weights of a checkpoint: what follows from other classes or another window stays as it is.

    Weights that depend on the classes stay too where the file names other classes, in the same number or not.
    """
    check_clip(file, clip)
    own, classes = model.state_dict(), file.hparams.get("classes")
    by_class, by_length = class_weights(settings, file, clip), length_weights(settings, file, clip)
    other_classes = classes is not None and list(classes) != settings.dataset.labels
    state = without_prefix(file.state, lambda known: not own.keys().isdisjoint(known))
    mapped = {key for key in own if key.startswith("feature_map.") and key not in state}
    differing = {key for key in by_class | by_length if key in state and state[key].shape != own[key].shape}
    left = sorted(differing | mapped | (by_class if other_classes else set()))
    load_model_file(model, file, left={*left, *model.centroid_buffers})
    kept = f"; other classes, windows or features: initial values of {', '.join(left)}" if left else ""
    print(f"weights of {file.path}{kept}")


def class_weights(settings: Settings, file: ModelFile, clip: ClipWeights | None = None) -> set[str]:
    """Return the names of the model's weights whose shape depends on the number of classes."""
    classes = {**settings.dataset.classes, "one more": "something else"}
    return _reshaped(settings, file, clip, settings.model, replace(settings.dataset, classes=classes))


def length_weights(settings: Settings, file: ModelFile, clip: ClipWeights | None = None) -> set[str]:
    """Return the names of the model's weights whose shape depends on the number of snippets in an input."""
    options = settings.model.options
    longer = {name: 2 * options[name] for name in ("visual_length", "num_segments", "seg_length") if name in options}
    config = replace(settings.model, options={**options, **longer})
    return _reshaped(settings, file, clip, config, settings.dataset)


def _reshaped(
    settings: Settings, file: ModelFile, clip: ClipWeights | None, config: ModelConfig, dataset: Dataset
) -> set[str]:
    with torch.random.fork_rng(devices=[]):
        model, clip = build_model(settings.model, settings.dataset, 0, file, clip)
        here, there = model.state_dict(), build_model(config, dataset, 0, file, clip)[0].state_dict()
    return {name for name in here if here[name].shape != there[name].shape}


def result_environment(hparams: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return the environment of a result, with the CLIP of its model."""
    return environment(device) | {"clip": hparams["clip"], "clip_fingerprint": hparams["clip_fingerprint"]}
