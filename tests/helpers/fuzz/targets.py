"""What is fuzzed: readers, with what must be true of everything that they read, and commands.

A target is a function of a case and, for a reader, of the path of a mutated file. It returns an outcome (nothing:
``RIGHT``) or raises ``UserError`` for what it refuses; every other exception is a failure.
"""

import argparse
import math
import random
import shutil
import zipfile
from collections.abc import Callable
from contextlib import closing, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from refusal import snapshot
from tiny import WIDTH, Tiny, quietly, strings

from clipfusionvad.__main__ import main as package_main
from clipfusionvad.cli.options import build_parser, option_file_of
from clipfusionvad.data.annotations import read_annotations, write_annotations_csv
from clipfusionvad.data.features import load_features, read_shape
from clipfusionvad.data.lists import read_list
from clipfusionvad.data.packed import open_store
from clipfusionvad.data.truth import read_truth
from clipfusionvad.datasets import DATASETS, UCF, find_dataset
from clipfusionvad.engine.checkpoint import read_model_file
from clipfusionvad.extraction.decode import read_frames
from clipfusionvad.extraction.jobs import find_videos
from clipfusionvad.io.errors import run_main
from clipfusionvad.models import find_method, method_names
from clipfusionvad.models.clip import load_clip
from clipfusionvad.models.layers.text import ClipTextTower
from clipfusionvad.report.scores import read_scores
from clipfusionvad.tools.detect.page import index_row, read_record, write_index
from clipfusionvad.tools.features.convert import convert_features
from fuzz.mutate import BOMBS, ODD_TEXTS, WRITE, damage, mutate, odd_value

#: Flags of a command that encodes videos, on the CPU.
TOY_ENCODER = f"--clip toy --embed-dim {WIDTH} --device cpu --crops 1"
#: ``ALTERED``: read although numbers in it were changed; only a checksum could tell.
OUTCOMES = RIGHT, REFUSED, ALTERED = "right", "refused", "altered"


def require(condition: Any, what: object) -> None:
    """Fail: what came out is neither a right answer nor a good refusal."""
    if not condition:
        raise AssertionError(what)


class Case(NamedTuple):
    """``folder`` is empty and its own, ``seeds`` holds valid files, of which the mutated one was made of ``seed``."""

    rng: random.Random
    folder: Path
    seeds: Path
    seed: Path = Path()

    def mutated(self, path: Path) -> Path:
        """Return a mutated copy of a file, or a copy of a folder with a mutated file, in the case's folder."""
        copy = Path((shutil.copytree if path.is_dir() else shutil.copy)(path, self.folder / path.name))
        changed = self.rng.choice(sorted(file for file in [copy, *copy.rglob("*")] if file.is_file()))
        changed.write_bytes(mutate(changed, self.rng))
        return copy

    def run(self, argv: list[Any], main: Callable = package_main, codes: tuple[int, ...] = (0,)) -> str:
        """Run a command in this process; it ends with one of these codes, or with one line and without a trace."""
        before = snapshot(self.folder)
        outcome = quietly(main, strings(argv))
        lines, end = outcome.err.splitlines(), repr(outcome.err[-500:])
        if outcome.code == 2:
            marks = [line.partition(" ")[0] for line in lines]
            require(marks == ["warning:"] * (len(lines) - 1) + ["error:"], f"no one line: {end}")
            require("".join(lines).isprintable(), f"control characters: {end}")
            require(snapshot(self.folder) == before, f"files changed by a refusal: {end}")
        require(outcome.code in (2, *codes) and "Traceback" not in outcome.err, f"exit code {outcome.code}: {end}")
        for path in snapshot(self.folder).keys() - before.keys():
            require(path.suffix != ".tmp", f"left over: {path}")
            require(path.suffix != ".html" or path.read_text("utf-8").rstrip().endswith("</html>"), f"cut: {path}")
        return REFUSED if outcome.code == 2 else RIGHT


#: What is called with a case and returns its outcome, and its share of the cases.
TARGETS: dict[str, tuple[Callable[[Case], str], int]] = {}


def target(weight: int, *seeds: str) -> Callable[[Callable], None]:
    """Add a function to ``TARGETS``; a file or folder that fits a pattern of ``seeds`` is mutated for it."""

    def add(run: Callable[..., str | None]) -> None:
        def outcome(case: Case) -> str:
            if not seeds:
                return run(case) or RIGHT
            seed = case.rng.choice(sorted(path for pattern in seeds for path in case.seeds.glob(pattern)))
            return run(case._replace(seed=seed), case.mutated(seed)) or RIGHT

        TARGETS[run.__name__] = outcome, weight

    return add


@target(30, "data/ucf/features/*.npy")
def features(case: Case, path: Path) -> None:
    found = load_features(path)
    strict = np.load(path, allow_pickle=False)
    require(found.ndim == 2 and found.size and np.isfinite(found).all(), f"features {found.shape}")
    require(np.array_equal(found, strict) and read_shape(path) == strict.shape, "other values than numpy reads")


@target(25, "data/*/t*n.csv", "data/*/test.csv")
def feature_lists(case: Case, path: Path) -> None:
    home = case.seed.parent
    dataset = DATASETS[home.name]
    entries = read_list(path, case.rng.choice([home, home / "features", None, case.folder / "nowhere"]), dataset)
    rows = [line for line in path.read_bytes().decode("utf-8-sig").splitlines() if line.strip(" ,\t")]
    require(0 < len(entries) <= len(rows), "more entries than rows")
    for entry in entries:
        require(entry.path.is_file() and dataset.encode(entry.label).any(), entry)


@target(20, "masks/*")
def masks(case: Case, path: Path) -> None:
    """Frame masks and MATLAB files; ``gt`` holds no names, which are those of the test list."""
    for name, item in read_annotations(path, DATASETS[path.name.partition("_")[0]]).items():
        # Masks name no classes.
        require(name == item.video and len(item.labels) in (len(item.segments), 0), item)
        require(all(0 <= start < end for start, end in item.segments), item)


@target(30, "annotations/*", "data/*/truth.csv")
def annotations(case: Case, path: Path) -> None:
    name = path.stem.partition("_")[0]
    dataset = DATASETS[name if name in DATASETS else case.seed.parent.name]
    found = read_annotations(path, dataset)
    require(found, "no videos")
    for name, item in found.items():
        require(name == item.video and len(item.segments) == len(item.labels), item)
        require(all(0 <= start < end for start, end in item.segments), item)
        require(all(label in dataset.labels[1:] for label in item.labels), item)
        require(item.frames is None or item.frames > 0, item)
    write_annotations_csv(case.folder / "again.csv", found.values())
    for name, item in read_annotations(case.folder / "again.csv", dataset).items():
        require((item.segments, item.frames) == (found[name].segments, found[name].frames), f"{item} came back changed")


@target(40, "data/ucf/gt*.npy", "data/ucf/truth.csv", "data/ucf/truth.csv")
def truths(case: Case, path: Path) -> None:
    home, names = case.seeds / "data" / "ucf", ["gt.npy", "gt_segment.npy", "gt_label.npy"]
    paths = [path if name == path.name else home / name for name in names]
    keyed = path.suffix == ".csv"
    entries = read_list(home / "test.csv", None, UCF)
    snippets = [read_shape(entry.path)[0] for entry in entries]
    truth = read_truth(*([path, None, None] if keyed else paths), entries, snippets, UCF)
    require(keyed or [len(part) for part in truth.frames] == [16 * count for count in snippets], "lengths")
    for frames, spans, labels in zip(truth.frames, truth.segments, truth.labels, strict=True):
        require(set(np.unique(frames)) <= {0, 1} and len(frames), "values")
        require(len(spans) == len(labels) and all(0 <= start <= stop for start, stop in spans), spans)
        wanted = np.zeros(len(frames))
        for start, stop in spans if labels != ["A"] else []:
            wanted[start:stop] = 1
        require(not keyed or np.array_equal(wanted, frames), "frames are not those of the intervals")


@target(20, "packed/*.pack")
def stores(case: Case, path: Path) -> str | None:
    whole, store = open_store(case.seed), open_store(path)
    if store.whole:
        parts = [store.video(row) for row in range(store.manifest.videos)]
        require([len(part) for part in parts] == store.lengths.tolist(), "lengths")
    if np.array_equal(store.features, whole.features) and np.array_equal(store.videos, whole.videos):
        return RIGHT
    same = (path / "manifest.json").read_bytes() == (case.seed / "manifest.json").read_bytes()
    require(same and store.features.shape == whole.features.shape, "other features than were packed")
    return ALTERED


def _compare(found: dict, wanted: dict, path: Path) -> str:
    """Right where the weights are those of the seed; altered where only a checksum could tell that they are not."""
    plain = all(value.device.type == "cpu" and value.layout == torch.strided for value in found.values())
    if plain and found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in found):
        return RIGHT
    # torch's older format has no checksums, and damage may have come with new ones.
    archive = zipfile.is_zipfile(path) and zipfile.ZipFile(path)
    require(not archive or archive.testzip() is None, "weights were altered, and a checksum would have told")
    return ALTERED


@target(90, "models/*")
def models(case: Case, path: Path) -> str:
    wanted, found = read_model_file(case.seed), read_model_file(path)
    require(all(isinstance(value, torch.Tensor) for value in found.state.values()), "not tensors")
    outcome = _compare(found.state, wanted.state, path)
    if path.suffix == ".safetensors":
        # Without our words there is no hash.
        same = found.hparams == wanted.hparams and outcome == RIGHT
        require(same or not found.hparams, f"weights or words changed, and the hash would have told: {found.hparams}")
    return outcome


@target(8, "clips/*")
def clips(case: Case, path: Path) -> str:
    found = load_clip(str(path))
    ClipTextTower(found)
    return _compare(found.state, load_clip(str(case.seed)).state, path)


@target(15, "runs/*/*scores.npz")
def scores(case: Case, path: Path) -> None:
    tested = read_scores(path)
    require(len(tested.scores) == len(tested.videos.entries) > 0, "videos")
    for found, entry in zip(tested.scores, tested.videos.entries, strict=True):
        require(found.anomaly.ndim == 2 and found.anomaly.shape[1] > 0, found.anomaly.shape)
        require(tested.videos.dataset.encode(entry.label).any(), entry)


@target(20, "extracted/manifest.jsonl")
def manifests(case: Case, path: Path) -> None:
    for source, name in find_videos([path]):
        require(isinstance(source, str) and not name.startswith("/") and ".." not in Path(name).parts, repr(name))
        require(name.isprintable(), repr(name))


@target(10, "detection.json")
def detections(case: Case, path: Path) -> None:
    """What an interrupted or foreign hand left of NAME.json; never an error, the video is scored again."""
    known = read_record(path)
    if known is not None:
        known["settings"], known["thresholds"], known["verdict"]
        write_index(case.folder, "t", [index_row("a", known)])


@target(30, "videos/*")
def videos(case: Case, path: Path) -> None:
    endings = [path.suffix] * 20 + [".mp4", ".mkv", ".flv", ".y4m", ".m3u8", ".txt", ""]
    path = path.rename(path.with_suffix(case.rng.choice(endings)))
    with closing(read_frames(path)) as found:
        shapes = [(frame.dtype, frame.ndim, frame.shape[2], frame.size > 0) for frame in found]
    require(set(shapes) == {(np.dtype(np.uint8), 3, 3, True)}, f"no frame and no word of it, or {set(shapes)}")


@target(20, "pictures/*")
def pictures(case: Case, path: Path) -> None:
    """Numbered pictures are a video of whole frames, or what cannot be read is told."""
    for source, _ in find_videos([path]):
        with closing(read_frames(source)) as found:
            shapes = {(frame.dtype, frame.ndim, frame.shape[2], frame.size > 0) for frame in found}
        require(shapes == {(np.dtype(np.uint8), 3, 3, True)}, f"no frame and no word of it, or {shapes}")


@target(30, "arrays/*")
def conversions(case: Case, path: Path) -> None:
    convert_features(path, case.folder / "out")
    written = [np.load(file) for file in (case.folder / "out").rglob("*.npy")]
    require(written and all(rows.ndim == 2 and rows.size for rows in written), "no features")
    require({rows.dtype for rows in written} <= {np.dtype(np.float16), np.dtype(np.float32)}, "another dtype")
    if path.name == "crops.npy":
        size = np.load(path, mmap_mode="r").size
        require(sum(rows.size for rows in written) == size, "other values than numpy reads")


@target(15, "shop.yaml")
def dataset_files(case: Case, path: Path) -> None:
    dataset = find_dataset(str(path))
    require(len(dataset.classes) >= 2 and 0 < dataset.fps < math.inf and dataset.test_crop >= 0, dataset)
    words = [word for pair in dataset.classes.items() for word in pair]
    require(all(isinstance(word, str) and word.strip() for word in words), "classes")
    dataset.label_of("fall_12__x", "Theft")
    require(dataset.encode(dataset.labels[-1]).sum() >= 1, "encode")


def _value(action: argparse.Action, rng: random.Random) -> Any:
    """Return a value for an option: one of its choices, one near its default, or an odd one."""
    if rng.random() < 0.3:
        return odd_value(rng)
    if action.choices and rng.random() < 0.8:
        return rng.choice(list(action.choices))
    if action.nargs == 0:
        return rng.choice([True, False])
    one = rng.choice([0, 1, 2, 0.5, 64, 1e-3, "x", "cpu", "auto", "toy", 3])
    return [one, rng.choice([1, 2, 0.5])] if action.nargs in ("+", "*", 2) else one


def _flags(actions: list[argparse.Action], rng: random.Random) -> list[str]:
    """Return up to three options with values that nobody expects."""
    argv: list[str] = []
    for action in rng.sample(actions, rng.choice([1, 1, 2, 3])):
        value = rng.choice([_value(action, rng), rng.choice(ODD_TEXTS), "a\udcff\udcfeb"])
        words = [str(word).replace("\0", "") for word in (value if isinstance(value, list) else [value]) or [""]]
        odd = rng.random() < 0.1
        flag = rng.choice(["--x", "--", "--=", "-h=3", "\udcff"] if odd else action.option_strings or ["stray"])
        argv += [f"{flag}={words[0]}"] if rng.random() < 0.3 else [flag, *words][: 1 if action.nargs == 0 else 9]
    return [word for word in argv if word not in ("-h", "--help")]


NAMES = "compare-features convert-features detect doctor evaluate export extract lists report sweep".split()
NAMES += "table uncertainty".split()
OWN = {name: import_module(f"clipfusionvad.cli.{name.replace('-', '_')}").make_parser for name in NAMES}


@target(50)
def options(case: Case) -> str:
    """Only parsed or refused, for any number of odd values: command lines of all commands, and config files."""
    rng, name = case.rng, case.rng.choice([*OWN, *DATASETS, *DATASETS])
    if name in OWN:
        parser = OWN[name]()
        return case.run(_flags(parser._actions, rng), lambda argv: parser.parse_args(argv) and 0)
    dataset, method, path = DATASETS[name], rng.choice(method_names()), case.folder / "config.yaml"
    actions = [action for action in build_parser(dataset, find_method(method))._actions if action.option_strings]
    values = {action.dest: _value(action, rng) for action in rng.sample(actions, rng.choice([1, 1, 2, 5]))}
    content = rng.choice(BOMBS).encode() if rng.random() < 0.15 else WRITE[".yaml"](values, rng)
    path.write_bytes(damage(content, rng) if rng.random() < 0.3 else content)
    flags, parse = rng.choice([_flags(actions, rng), ["--config", path]]), option_file_of(dataset).parse_args
    return case.run(["--method", method, *flags], lambda argv: run_main(lambda: parse(argv) and 0))


def _until_training(argv: list[str]) -> int:
    """Run a command up to the first step of a training."""
    with mock.patch("clipfusionvad.cli.training.start_run", side_effect=StopIteration), suppress(StopIteration):
        return package_main(argv)
    return 0


# Options whose large values are honest wishes for more time or memory.
LONG = "max_epoch num_refinement_steps workers device compile demo stream timeout ray_address engine shard".split()
LONG += "curve_pictures levels seeds clip event_clip annotated bootstrap readme".split()


@target(40)
def commands(case: Case) -> str:
    """A whole command, up to the first step of a training, with one input mutated or up to two odd options."""
    rng, seeds, method = case.rng, case.seeds, case.rng.choice(["clipfusionvad", "anomalyclip", "iefvad"])
    home, features = seeds / "data/ucf", seeds / "data/ucf/features"
    feature = min(features.iterdir())
    tiny = Tiny("ucf", home, case.folder, [], method)
    model = seeds / f"models/{method}{rng.choice(['', '_released'])}.pth"
    fit = f"--dataset ucf --feature-root {home} --frames-per-snippet {1 if method == 'anomalyclip' else 16}"
    trained = " ".join(tiny.train_flags(fit, "--packed-dir", case.folder))
    run = seeds / "runs" / rng.choice(["training", "test", "scored", "trained"])
    video = rng.choice(sorted((seeds / "videos").iterdir()))
    lines = [
        f"train {trained}",
        f"train {trained} --init-from {model}",
        f"pack {trained}",
        f"test {' '.join(tiny.test_flags(fit))} --model-path {model}",
        f"extract --videos {video} --output out {TOY_ENCODER}",
        f"extract --videos {seeds}/extracted/manifest.jsonl --output out {TOY_ENCODER}",
        f"detect {video} --checkpoint {model} --output out --clip toy --event-clip toy --device cpu --video none",
        f"lists --dataset ucf --features {features} --output out --annotations {home}/truth.csv",
        f"lists --dataset {seeds}/shop.yaml --features {features} --output out",
        f"report {run} --output page.html",
        f"table {run} --bootstrap 20 --output table.md",
        f"export {model} --output out/m.pth",
        f"export {seeds}/models/iefvad.safetensors --output out/m.pth",
        f"evaluate {seeds}/runs/test/test_scores.npz --dataset ucf --truth {home}/truth.csv --resamples 9",
        f"compare-features {feature} {feature}",
        f"convert-features {seeds}/arrays out",
        f"extract --videos {seeds}/pictures --output out {TOY_ENCODER}",
        f"detect {seeds}/pictures/01_0014 --checkpoint {run} --output out --clip toy --device cpu --video none",
    ]
    argv = rng.choice(lines).split()
    if rng.random() < 0.6:
        at = rng.choice([at for at, word in enumerate(argv) if word.startswith(str(seeds))])
        argv[at] = str(case.mutated(Path(argv[at])))
    else:
        parser = OWN[argv[0]]() if argv[0] in OWN else build_parser(UCF, find_method(method))
        argv += _flags([action for action in parser._actions if action.dest not in LONG], rng)
    return case.run(argv, _until_training, (0, 1) if argv[0] in OWN else (0,))


@target(5, "trained/run/last.pt")
def resumed(case: Case, path: Path) -> str:
    (case.folder / "run").mkdir()
    path.rename(case.folder / "run" / path.name)
    tiny = Tiny("ucf", case.seeds / "trained", case.folder, [])
    flags = tiny.train_flags("--use-checkpoint", "--max-epoch", 2, "--no-packed")
    return case.run(["train", "--dataset", "ucf", *flags], _until_training)
