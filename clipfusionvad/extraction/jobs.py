"""What is to be extracted: the options, the videos, and the manifest of what has been extracted."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path, PurePosixPath
from typing import Annotated, Any
from urllib.parse import unquote, urlsplit

from clipfusionvad.extraction.decode import is_address
from clipfusionvad.extraction.pictures import NUMBER, PICTURES, files_of, find_pictures, group_pictures, is_pictures
from clipfusionvad.extraction.snippets import ExtractOptions
from clipfusionvad.io.errors import UserError, is_text, printable, warn
from clipfusionvad.io.files import check_writable, read_text, walk_files, without_nan, writing
from clipfusionvad.io.option import Option, size

#: Suffixes of the files that are videos when a folder is given.
SUFFIXES = ".3gp .asf .avi .flv .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .mxf .ogv .ts .vob .webm .wmv".split()
MANIFEST = "manifest.jsonl"
# Of a file name: systems allow 255 bytes, with the endings of results and of unfinished files.
_LONGEST = 220
_PATHS = "folders (whose subfolders are kept), video files, .txt lists of them, a manifest.jsonl, folders of pictures"


@dataclass(frozen=True)
class EncoderConfig:
    """The image encoder, described so that another process or machine can build it."""

    clip: Annotated[str, Option("CLIP model name, file, hf:owner/name/file, or 'toy'")] = "ViT-B/16"
    embed_dim: Annotated[int, size("width of the features of --clip toy")] = 512
    device: Annotated[str, Option("auto, cpu, cuda, cuda:1, …")] = "auto"
    precision: Annotated[str, Option("arithmetic of the encoder", choices=("fp32", "fp16", "bf16"))] = "fp32"
    batch_size: Annotated[int, Option("images encoded at once", minimum=1)] = 64


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """What ``extract`` does: ``videos`` to features below ``output``."""

    videos: Annotated[tuple[str, ...], Option(_PATHS, metavar="PATH", required=True, nonempty=True)]
    output: Annotated[str, Option("folder for features and manifest", metavar="DIR", required=True)]
    crops: Annotated[int, Option("1: centre; 5: and corners; 10: and mirror images", choices=(1, 5, 10))] = 10
    crop_ids: Annotated[tuple[int, ...] | None, Option("only these crops, 0 to 9", metavar="K", nonempty=True)] = None
    dtype: Annotated[str, Option("type of the stored rows", choices=("float16", "float32"))] = "float16"
    event_clip: Annotated[str | None, Option("encoder of event images: a file or a name", metavar="CLIP")] = None
    workers: Annotated[int, Option("videos that are extracted at the same time, each in a process", minimum=1)] = 1
    shard: Annotated[str | None, Option("extract only the I-th of N parts, counted from 1", metavar="I/N")] = None
    engine: Annotated[str, Option("run on this machine, or on a Ray cluster", choices=("local", "ray"))] = "local"
    ray_address: Annotated[str | None, Option("its address, or auto (default: a local one)", metavar="HOST:PORT")] = (
        None
    )
    overwrite: Annotated[bool, Option("replace features that exist")] = False
    fps: Annotated[
        float | None, Option("frame rate, if a video reports a wrong one; of pictures (default: 25)", above=0)
    ] = None
    options: ExtractOptions = field(default_factory=ExtractOptions)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)


@dataclass(frozen=True)
class Job:
    """One video to extract: ``name`` is the path of its features below ``output``, without ``__k.npy``."""

    source: str
    name: str
    output: str
    options: ExtractOptions
    encoder: EncoderConfig
    dtype: str = "float16"
    fps: float | None = None

    @property
    def files(self) -> list[str]:
        """Feature files relative to ``output``, in the order of the crops."""
        return [f"{self.name}__{crop}.npy" for crop in self.options.crops]

    @property
    def paths(self) -> list[Path]:
        return [Path(self.output, file) for file in self.files]

    @property
    def bytes(self) -> int | None:
        """Size of the video file, or of all its pictures; None for an address."""
        files = files_of(self.source)
        return sum(file.stat().st_size for file in files) if files else None

    def recorded_options(self) -> dict[str, Any]:
        """Return the options that the features depend on, besides the encoder's weights, as plain values."""
        options = asdict(self.options) | {"crops": list(self.options.crops)}
        if self.options.stream != "event":
            options = {key: value for key, value in options.items() if not key.startswith("event_")}
        return options | {"dtype": self.dtype, "precision": self.encoder.precision}


def find_videos(given: Sequence[str | Path]) -> list[tuple[str, str]]:
    """Return the given videos as (source, name of the features), sorted by name.

    A folder stands for all video files below it. If it has none, it stands for its folders of numbered pictures. Names
    keep the subfolders. A text file (``.txt``) lists videos, one path or address per line, with paths relative to the
    list; names keep the last folder, which is the class in the datasets. A manifest (``.jsonl``) stands for its videos
    under their recorded names. Anything else is a video.

    Raises ``UserError`` if nothing is found, and for two videos with the same feature files.
    """
    found: dict[str, str] = {}
    for source, name in (pair for item in given for pair in _expand(str(item))):
        other = found.setdefault(name, source)
        if other != source:
            raise UserError(f"{other} and {source} would both become {name}: give each its own --output")
    if not found:
        known = "files such as .mp4 and .mkv, or numbered pictures: 000.jpg, 001.jpg, …"
        raise UserError(f"no videos below {', '.join(map(str, given))} ({known})")
    return sorted(((source, name) for name, source in found.items()), key=lambda pair: pair[1])


def check_name(source: str, name: str) -> None:
    """Raise ``UserError`` for a video whose name cannot be that of its results, in files and in what is printed."""
    why = ""
    if not name or name.startswith("/") or ".." in name.split("/"):
        why = "it leads out of their folder"
    elif not is_text(name):
        # Control characters could pass for lines of a list or for commands to a terminal.
        why = "it has control characters or bytes that are not UTF-8: rename the file"
    elif len(name) >= 1000 or len(PurePosixPath(name).name.encode()) > _LONGEST:
        why = f"it is longer than {_LONGEST} bytes: rename the file"
    if why:
        raise UserError(f"{printable(source)}: {printable(name)!r} cannot be the name of its results: {why}")


def _expand(item: str) -> Iterator[tuple[str, str]]:
    path = Path(item)
    if is_address(item):
        yield item, _listed_name(item)
    elif path.is_dir():
        yield from _expand_folder(path)
    elif is_pictures(item):
        yield item, PurePosixPath(_listed_name(item)).name
    elif path.suffix.lower() in (".npy", ".npz"):
        raise UserError(f"{printable(item)} holds features, not a video; list features in a CSV file and `test` them")
    elif path.suffix.lower() == ".txt":
        for line in filter(None, map(str.strip, read_text(path, "list of videos").splitlines())):
            if not (is_address(line) or (path.parent / line).exists()):
                line = line.replace("\\", "/")
            source = line if is_address(line) else str(path.parent / line)
            yield from _expand_listed(Path(source), line) if Path(source).is_dir() else [(source, _listed_name(line))]
    elif path.suffix.lower() == ".jsonl":
        for number, record in _read_lines(path):
            match record:
                case {"video": str(name), "source": str(source)}:
                    # A video that failed for its name has a record of its state.
                    if is_text(name) or "state" not in record:
                        check_name(source, name)
                        yield source, name
                case _:
                    raise UserError(f"{path}, line {number}, does not name a video and its source")
    elif path.exists():
        yield item, path.stem
    else:
        raise UserError(f"video not found: {item}")


def _expand_folder(folder: Path) -> Iterator[tuple[str, str]]:
    videos, pictures = list[Path](), dict[Path, list[str]]()
    for file in walk_files(folder, ""):
        if file.suffix.lower() in SUFFIXES:
            videos.append(file)
        elif file.suffix.lower() in PICTURES:
            pictures.setdefault(file.parent, []).append(file.name)
    if not videos:
        yield from find_pictures(folder, pictures)
    for parent in {file.parent for file in videos}:
        # Pictures beside a video are covers or figures of results.
        pictures.pop(parent, None)
    if videos and (left := next(filter(lambda parent: group_pictures(pictures[parent]), pictures), None)):
        warn(f"{folder} holds video files, so the pictures below it are ignored: pass {left} if it is a video")
    yield from ((str(file), file.relative_to(folder).with_suffix("").as_posix()) for file in videos)


def _expand_listed(folder: Path, line: str) -> Iterator[tuple[str, str]]:
    """Yield the videos of a folder in a list; one that is a video itself is named like a file."""
    for source, name in _expand_folder(folder):
        yield source, _listed_name(f"{line}/{NUMBER}.jpg") if name == folder.name else f"{folder.name}/{name}"


def _listed_name(line: str) -> str:
    path = PurePosixPath(unquote(urlsplit(line).path) if is_address(line) else Path(line).as_posix())
    parts = [part for part in path.parent.parts[-1:] if part not in ("/", ".", "..")]
    stem = path.stem.removesuffix(NUMBER).rstrip("_-. ") if is_pictures(line) else path.stem or "video"
    return PurePosixPath(*parts, stem).as_posix()


class FeatureManifest:
    """The JSON lines ``manifest.jsonl`` of a feature folder; each shard writes its own ``manifest-i-of-n.jsonl``.

    A line is about one video: "begun", then "done" or "failed". Of all manifests in the folder the newest one counts.
    """

    def __init__(self, folder: str | Path, shard: tuple[int, int] | None = None):
        """Raise ``UserError`` for a folder without write permission and for a file that is not a manifest."""
        self.folder = Path(folder)
        self.path = self.folder / (MANIFEST if shard is None else f"manifest-{shard[0]}-of-{shard[1]}.jsonl")
        check_writable(self.path)
        self.records: dict[str, dict[str, Any]] = {}
        for path in sorted(self.folder.glob("manifest*.jsonl")):
            for number, record in _read_lines(path):
                if not _is_record(record):
                    raise UserError(f"{path}, line {number}, is not from a manifest of features: move the file away")
                previous = self.records.get(record["video"])
                if previous is None or previous["time"] <= record["time"]:
                    self.records[record["video"]] = record

    def append(self, name: str, state: str, facts: Mapping[str, Any]) -> None:
        """Add a line about a video, after completing a line that a crash cut off."""
        time = datetime.now(timezone.utc).isoformat(timespec="microseconds")
        record = {"video": name, "state": state, "time": time, **facts}
        line = json.dumps(without_nan(record)).encode() + b"\n"
        with writing(self.path):
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a+b") as file:
                if file.seek(0, os.SEEK_END) and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
                    line = b"\n" + line
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        self.records[name] = record

    def is_done(self, job: Job, fingerprint: str) -> bool:
        """Return whether all files of a job exist, made with the same options.

        Raises ``UserError`` if they were made with other options, from another video, or by something else.
        """
        record, present = self.records.get(job.name), [path for path in job.paths if path.exists()]
        if record is None and present:
            raise UserError(f"{present[0]} exists, but is in no manifest, so its options are unknown")
        if record is None or record["state"] != "done" or not present:
            return False
        before, now = record["options"], job.recorded_options()
        # An option that came later had its default.
        before = {key: getattr(ExtractOptions, key, None) for key in now} | before
        options = [(key, before.get(key), now.get(key)) for key in now | before]
        changed = [f"{key} ({old}, now {new})" for key, old, new in options if old != new]
        if record["model"]["fingerprint"] != fingerprint:
            changed.append(f"model ({record['model']['clip']}, now {job.encoder.clip})")
        if record["bytes"] != job.bytes:
            changed.append(f"video ({record['source']} of {record['bytes']} bytes, now {job.source} of {job.bytes})")
        if changed:
            raise UserError(
                f"features of {job.name} in {self.folder} were made with other options: {', '.join(changed)}"
            )
        return len(present) == len(job.paths)


def _is_record(record: Any) -> bool:
    match record:
        case {"video": str(), "time": str(), "state": "done", "model": dict(model), "options": dict()}:
            return {"bytes", "source"} <= record.keys() and {"clip", "fingerprint"} <= model.keys()
        case {"video": str(), "time": str(), "state": str(state)}:
            return state != "done"
    return False


def _read_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield line numbers and values of JSON lines, without a line that a crash cut off."""
    for number, line in enumerate(read_text(path, "manifest").splitlines(), 1):
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError):
            continue
