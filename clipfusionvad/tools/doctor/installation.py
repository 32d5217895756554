"""Checks of the installation: versions that do not fit, missing packages, and limits of the machine."""

import importlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import check_writable
from clipfusionvad.models.clip import openai_clip
from clipfusionvad.tools.doctor import ERROR, NOTE, WARNING, Finding

# Bytes of memory, of disk (low, none), and of shared memory below which a training has failed.
LITTLE_MEMORY, LITTLE_DISK, NO_DISK, LITTLE_SHARED = 2 * 2**30, 5 * 2**30, 2**28, 2**27
# Largest error of a product of two matrices of 64 rows in float32, TF32 included.
PRODUCT_ERROR = 0.1


def read_requirements() -> list[str]:
    """Return the requirements in the package's metadata, or in pyproject.toml if it runs from its repository."""
    try:
        return metadata.requires("clipfusionvad") or []
    except metadata.PackageNotFoundError:
        path = Path(__file__).parents[3] / "pyproject.toml"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    found = []
    tables = text[text.find("dependencies = [") : text.find("[project.scripts]")]
    for extra, items in re.findall(r"^(\w+) = \[(.*?)\]$", tables, re.MULTILINE | re.DOTALL):
        marker = "" if extra == "dependencies" else f"; extra == '{extra}'"
        found += [item + marker for item in re.findall(r'"([^"]+)"', items)]
    return found


def installed_versions() -> dict[str, str]:
    """Return the versions of all installed distributions, by canonical name."""
    named = ((item.metadata["Name"], item.version) for item in metadata.distributions())
    return {canonicalize_name(name): version for name, version in named if name and version}


@dataclass(frozen=True)
class Installation:
    """What the checks read; the defaults are this machine's."""

    folder: Path = field(default_factory=Path.cwd)
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    requirements: Sequence[str] = field(default_factory=read_requirements)
    versions: Mapping[str, str] = field(default_factory=installed_versions)


def package_versions(machine: Installation) -> Iterator[Finding]:
    """A package is missing, or has a version that the requirements exclude."""
    for text in machine.requirements:
        needed = Requirement(text)
        extra = re.search(r"extra == ['\"](\w+)['\"]", text)
        if needed.marker and not needed.marker.evaluate({"extra": extra.group(1) if extra else ""}):
            continue
        there = machine.versions.get(canonicalize_name(needed.name))
        advice = f"pip install '{needed.name}{needed.specifier}'"
        if there is None and extra:
            yield Finding(NOTE, f"{needed.name} is not installed: only {extra.group(1)} needs it", advice)
        elif there is None:
            yield Finding(ERROR, f"{needed.name} is not installed", advice)
        elif not needed.specifier.contains(there, prereleases=True):
            what = f"{needed.name} is {there}, but {needed.specifier} is required"
            yield Finding(WARNING if extra else ERROR, what, advice)


def clip_import(machine: Installation) -> Iterator[Finding]:
    """openai-clip cannot be imported: it needs torchvision, and pkg_resources of setuptools below 81."""
    try:
        openai_clip()
    except (UserError, RuntimeError, OSError) as error:
        yield Finding(ERROR, str(error), "" if isinstance(error, UserError) else "reinstall torchvision")


def torchvision_pairing(machine: Installation) -> Iterator[Finding]:
    """torchvision was built for another version of torch."""
    torch_version, vision = machine.versions.get("torch", ""), machine.versions.get("torchvision", "")
    try:
        pins = [Requirement(text) for text in metadata.requires("torchvision") or ()]
    except (metadata.PackageNotFoundError, InvalidRequirement):
        return
    for pin in pins:
        if torch_version and pin.name == "torch" and not pin.specifier.contains(torch_version, prereleases=True):
            what = f"torchvision {vision} is built for torch{pin.specifier}, not for {torch_version}"
            yield Finding(ERROR, what, "install both from one index: pip install torch torchvision")


def clip_weights(machine: Installation) -> Iterator[Finding]:
    """OpenAI's CLIP is not downloaded yet, or its download was interrupted."""
    cache = Path(machine.environ.get("HOME", "~")).expanduser() / ".cache" / "clip"
    files = list(cache.glob("*.pt"))
    if not files:
        what = f"no CLIP weights in {cache}: they are downloaded on first use"
        yield Finding(NOTE, what, "run python -m clipfusionvad clip ViT-B/16; without a network, it says what to do")
    for path in files:
        if path.stat().st_size < 2**26:
            yield Finding(WARNING, "too small for weights of CLIP", "python -m clipfusionvad clip NAME", str(path))


def gpu(machine: Installation) -> Iterator[Finding]:
    """torch cannot use a GPU, or a GPU computes another result than the CPU."""
    if not torch.cuda.is_available():
        if cuda := torch.version.cuda:
            what = f"torch is built for CUDA {cuda}, but finds no GPU that it can use"
            yield Finding(WARNING, what, "compare the driver (nvidia-smi) with it; a CPU needs nothing")
        elif shutil.which("nvidia-smi"):
            what = f"there is a GPU driver, but torch {torch.__version__} is built for CPUs"
            yield Finding(WARNING, what, "install the CUDA build of torch and torchvision (pytorch.org)")
        return
    for index in range(torch.cuda.device_count()):
        name = f"GPU {index} ({torch.cuda.get_device_name(index)})"
        try:
            ours = torch.rand(64, 64, generator=torch.Generator().manual_seed(0))
            theirs = (ours.to(f"cuda:{index}") @ ours.to(f"cuda:{index}")).cpu()
            free = torch.cuda.mem_get_info(index)[0]
        except RuntimeError as error:
            advice = "is torch built for this GPU, and is its memory free (nvidia-smi)?"
            yield Finding(ERROR, f"{name} cannot compute: {str(error).splitlines()[0]}", advice)
            continue
        if not (theirs - ours @ ours).abs().max() < PRODUCT_ERROR:
            yield Finding(ERROR, f"{name} computes a wrong product", "do not use it")
        if free < LITTLE_MEMORY:
            yield Finding(WARNING, f"{name} has {_size(free)} free", "see nvidia-smi for other programs")
    if not torch.backends.cudnn.is_available():
        yield Finding(WARNING, "torch finds no cuDNN", "reinstall torch: convolutions are slow without it")


def video_decoding(machine: Installation) -> Iterator[Finding]:
    """PyAV cannot decode H.264, the codec of nearly all videos."""
    try:
        importlib.import_module("av").codec.Codec("h264", "r")
    except (ImportError, ValueError, AttributeError) as error:
        yield Finding(ERROR, f"PyAV cannot decode H.264 ({error})", "pip install --force-reinstall av")


def memory(machine: Installation) -> Iterator[Finding]:
    """There is little memory, or little shared memory for loader processes."""
    info = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s+(\d+) kB", info.read_text()) if info.is_file() else None
    if found and (available := 1024 * int(found.group(1))) < LITTLE_MEMORY:
        yield Finding(WARNING, f"{_size(available)} of memory free", "end other programs")
    shared = Path("/dev/shm")
    if shared.is_dir() and (free := shutil.disk_usage(shared).free) < LITTLE_SHARED:
        advice = "use --workers 0, or give the container more (--shm-size)"
        yield Finding(WARNING, f"{_size(free)} free in {shared}, which loader processes use", advice)


def disk(machine: Installation) -> Iterator[Finding]:
    """There is little room on the disk, or the folders for runs and models cannot be written to."""
    if (free := shutil.disk_usage(machine.folder).free) < LITTLE_DISK:
        what = f"{_size(free)} free on the disk of {machine.folder}"
        yield Finding(ERROR if free < NO_DISK else WARNING, what, "make room, or use another --output-dir")
    for name in ("runs", "model"):
        try:
            check_writable(machine.folder / name / "file")
        except UserError as error:
            yield Finding(ERROR, str(error), "use another --output-dir and --model-path")


def threads(machine: Installation) -> Iterator[Finding]:
    """Thread settings are not numbers, or far from the number of cores."""
    cores = os.cpu_count() or 1
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        value = machine.environ.get(name)
        if value is not None and not value.replace(",", "").isdigit():
            yield Finding(WARNING, f"{name} is {value!r}, which is not a number", "unset it, or give a number")
        elif value is not None and not 1 <= int(value.split(",")[0] or 0) <= 2 * cores:
            what = f"{name} is {value}, but there are {cores} cores"
            yield Finding(WARNING, what, "unset it: more threads than cores are slower")


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
