"""Opens the lists, features and truth that the options name, and checks them before anything starts."""

from collections.abc import Sequence

from clipfusionvad.data.config import NO_TRUTH, DataConfig
from clipfusionvad.data.features import check_features
from clipfusionvad.data.lists import Entry, add_streams, read_list
from clipfusionvad.data.packed import FEATURES, Store, open_store, store_folder
from clipfusionvad.data.truth import read_truth
from clipfusionvad.datasets import Dataset
from clipfusionvad.engine.evaluator import VideoDataset
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.provenance import CRC, Sources
from clipfusionvad.models import find_method
from clipfusionvad.models.config import ModelConfig


def read_entries(
    path: str, dataset: Dataset, model: ModelConfig, data: DataConfig, may_lack_files: bool = False
) -> list[Entry]:
    """Return a list's entries, with the files of all streams that the method reads."""
    entries = read_list(path, data.feature_root, dataset, may_lack_files)
    streams = find_method(model.method).streams
    if len(streams) == 1:
        return entries
    folders = data.stream_folders or streams
    if len(folders) != len(streams):
        raise UserError(f"--stream-folders takes {len(streams)} words, for {', '.join(streams)}")
    return add_streams(entries, folders, path, may_lack_files)


def open_list(
    path: str, dataset: Dataset, model: ModelConfig, data: DataConfig, training: bool = False
) -> tuple[list[Entry], Store | None]:
    """Return a list's entries, and its packed features where there are some and they may be used.

    Training needs model inputs, so a store of sampled inputs serves if the method always samples the same ones; a test
    needs whole videos.
    """
    folder = store_folder(path, data.packed_dir)
    if not (data.packed and folder.is_dir()):
        return read_entries(path, dataset, model, data), None
    method = find_method(model.method)
    store = open_store(folder)
    store.check_fit(path, method.streams, model.visual_width, method.sampling_of(model.options) if training else None)
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


def read_test_set(
    dataset: Dataset, model: ModelConfig, data: DataConfig, sources: Sources | None = None
) -> VideoDataset:
    """Read and check the test list, its features and its truth, if there is one; note the files in ``sources``."""
    entries, store = open_list(data.test_list, dataset, model, data)
    noted = sources or Sources()
    snippets = check_list(data.test_list, entries, store, model.visual_width, data.check, "test features", noted)
    truth = None
    if data.gt_path != NO_TRUTH:
        truth_paths = (data.gt_path, data.gt_segment_path, data.gt_label_path)
        truth = read_truth(*truth_paths, entries, snippets, dataset, data.frames_per_snippet)
    return VideoDataset(entries, dataset, model.visual_width, truth, data.frames_per_snippet)
