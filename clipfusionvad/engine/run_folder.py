"""The folder of a run: its files, which one a run takes, and what is recorded of its options."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from clipfusionvad.datasets import DATASETS, Dataset, yaml_content
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import write_json, write_text, writing
from clipfusionvad.io.provenance import Sources

LAST, PREVIOUS, BEST, NORMAL_CENTROID, METRICS = "last.pt", "previous.pt", "best.pt", "calibration.pt", "metrics.json"
OPTIONS, DATASET, ENVIRONMENT, DATA = "options.yaml", "dataset.yaml", "environment.json", "data.csv"
LOSSES, EVALUATIONS, EVALUATIONS_TABLE = "losses.csv", "metrics.jsonl", "metrics.csv"
#: The folder of TensorBoard's event files.
CURVES = "tensorboard"
#: The id of the run at each tracking service, so that a resumed run continues there.
IDS = "trackers.json"


def choose_folder(given: str | None, stem: str, resume: bool) -> Path:
    """Return the folder of a run: the given one, else a new one ``runs/stem-N``; the latest of those to resume."""
    if given is not None:
        return Path(given)
    number, folder = 1, Path("runs") / stem
    while folder.exists():
        number += 1
        following = Path("runs") / f"{stem}-{number}"
        if resume and not following.exists():
            break
        folder = following
    return folder


def check_folder(folder: Path, may_be_taken: bool, seeds: Sequence[int] = ()) -> None:
    """Raise ``UserError`` for a folder with a run that must not be changed; ``seeds`` have a folder each in it.

    A folder is that of one run, or of several seeds.
    """
    if not seeds and seeds_in(folder):
        raise UserError(f"{folder} holds the runs of several seeds: name another --output-dir")
    if seeds and states_in(folder):
        raise UserError(f"{folder} holds the run of one seed: name another --output-dir for several")
    trained = [str(seed) for seed in seeds if states_in(seed_folder(folder, seed))]
    if (trained or states_in(folder)) and not may_be_taken:
        what = f"a run of seed {', '.join(trained)}" if trained else "a run"
        raise UserError(
            f"{folder} already holds {what}: continue it with --use-checkpoint, name another --output-dir, "
            f"or start again with --overwrite"
        )


def seed_folder(folder: Path, seed: int) -> Path:
    return folder / f"seed{seed}"


def seeds_in(folder: Path) -> list[str]:
    """Return the names of the folders in it that hold the run of a seed."""
    return sorted(path.name for path in folder.glob("seed*") if states_in(path))


def runs_below(folder: Path, *files: str) -> list[Path]:
    """Return the folders that hold a run, or one of some files: those below a folder, up to the seeds of sweeps."""
    depths = ("*", "*/*", "*/*/*")
    return sorted({path.parent for depth in depths for name in files for path in folder.glob(f"{depth}/{name}")})


def which_run(folder: Path) -> str:
    """Return what to give in place of a folder that holds no run itself, where there are runs below it; else empty."""
    runs = [path.relative_to(folder).as_posix() for path in runs_below(folder, OPTIONS, LAST)]
    more = f" and {len(runs) - 4} more" if len(runs) > 4 else ""
    return f"give the folder of one of its runs ({', '.join(runs[:4])}{more})" if runs else ""


def states_in(folder: Path) -> list[Path]:
    """Return the saved states of a run, the newest first."""
    return [path for path in (folder / LAST, folder / PREVIOUS) if path.is_file()]


def clear_run(folder: Path) -> None:
    """Remove the states and the records of a run."""
    with writing(folder):
        for name in (PREVIOUS, LAST, BEST, NORMAL_CENTROID, EVALUATIONS, EVALUATIONS_TABLE, LOSSES, IDS):
            (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / CURVES, ignore_errors=True)


def record_run(folder: Path, dataset: Dataset, options: dict[str, Any], about: dict[str, Any], read: Sources) -> None:
    """Write the resolved options (a valid --config again), the environment (``about``) and what was read."""
    write_text(folder / OPTIONS, yaml.safe_dump(options, sort_keys=True))
    write_json(folder / ENVIRONMENT, about)
    read.write(folder / DATA)
    record_dataset(folder, dataset)


def record_dataset(folder: Path, dataset: Dataset) -> None:
    """Write the description of a dataset that is not a benchmark as a YAML file."""
    if dataset.name not in DATASETS:
        write_text(folder / DATASET, yaml.safe_dump(yaml_content(dataset), sort_keys=False, allow_unicode=True))


#: The entry of metrics that says why some of them are undefined (None in JSON).
UNDEFINED = "undefined"


def flat_metrics(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested metrics into one row: ``map@0.1``; without the reasons for those that are undefined."""
    flat: dict[str, Any] = {}
    for name, value in metrics.items():
        if name == UNDEFINED:
            continue
        flat |= flat_metrics(value, f"{prefix}{name}@") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat
