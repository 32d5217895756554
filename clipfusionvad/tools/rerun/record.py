"""The record of a run or a test, and what has changed since then: code, machine, options and data."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from clipfusionvad.data.packed import open_store
from clipfusionvad.datasets import Dataset, find_dataset
from clipfusionvad.engine.config import default_options
from clipfusionvad.engine.run_folder import DATA, DATASET, ENVIRONMENT, METRICS, OPTIONS, seeds_in, which_run
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import read_json
from clipfusionvad.io.hub import local_path
from clipfusionvad.io.provenance import CRC, Source, Sources, environment, short_hash
from clipfusionvad.models import current_options, read_options
from clipfusionvad.report.results import RUN_SCORES, TEST_DATA, TEST_SCORES
from clipfusionvad.report.scores import read_scores

# Equal bits need equal values of these.
_DECISIVE = ("sources", "packages", "python", "cpu", "threads", "processes", "deterministic", "gpu", "cuda", "cudnn")
# Options that a rerun sets itself.
_OWN = {"output_dir", "model_path", "checkpoint_path", "device"}


@dataclass(frozen=True)
class RunRecord:
    """The options, environment and data of a run or a test; ``sources`` is None where they were not recorded."""

    folder: Path
    is_test: bool
    options: Mapping[str, Any]
    environment: Mapping[str, Any]
    sources: list[Source] | None
    dataset: Dataset

    def code_changes(self) -> list[str]:
        """Return the changes of code, packages and machine since the record."""
        return list(_changes(self.environment, environment(), (*_DECISIVE, "version", "commit", "platform")))

    def option_changes(self, now: Mapping[str, Any]) -> list[str]:
        """Return options that were edited since, and those that came later and are not at their defaults."""
        then, scores, edited = self.options, self.folder / RUN_SCORES, list[str]()
        usual = default_options(str(then.get("method")))
        if not self.is_test and scores.is_file():
            used = current_options(read_scores(scores).options)
            edited = [f"{line} in {OPTIONS}" for line in _changes(used, then, sorted(used.keys() | then.keys()))]
        later = {key: value for key, value in now.items() if key not in then and key not in _OWN}
        return edited + [f"{key}: not recorded then, now {later[key]}" for key in later if later[key] != usual.get(key)]

    def reasons_for_other_bits(self, folder: Path) -> list[str]:
        """Return why a repetition in ``folder`` may have other bits: changes, or a GPU without --deterministic."""
        scores = folder / TEST_SCORES
        now = read_scores(scores).environment if self.is_test else read_json(folder / ENVIRONMENT, "environment")
        reasons = list(_changes(self.environment, now, ("device", *_DECISIVE)))
        if now.get("device") != "cpu" and not now.get("deterministic"):
            reasons.append("on a GPU without --deterministic")
        return reasons


def read_record(folder: Path) -> RunRecord:
    """Read the record of a folder; ``UserError`` if it holds neither a finished run nor a test."""
    if is_run := (folder / OPTIONS).is_file():
        if not (folder / METRICS).is_file():
            raise UserError(f"the run in {folder} is not finished: continue it with --use-checkpoint first")
        options, made = read_options(folder / OPTIONS), read_json(folder / ENVIRONMENT, "environment")
    elif (folder / TEST_SCORES).is_file():
        tested = read_scores(folder / TEST_SCORES)
        options, made = current_options(tested.options), tested.environment
    else:
        hint = "not all of its seeds are trained" if seeds_in(folder) else which_run(folder)
        hint = hint or f"no {OPTIONS} and no {TEST_SCORES}"
        raise UserError(f"{folder} holds neither a finished run nor a test ({hint})")
    described, data = folder / DATASET, folder / (DATA if is_run else TEST_DATA)
    dataset = find_dataset(str(described) if described.is_file() else str(options.get("dataset")))
    return RunRecord(
        folder, not is_run, options, made, [*Sources.read(data).found.values()] if data.is_file() else None, dataset
    )


def data_changes(sources: Sequence[Source]) -> list[str]:
    """Return the files that have changed or are missing."""
    with ThreadPoolExecutor() as pool:
        # disable=None: no bar where stderr is not a terminal.
        states = list(tqdm(pool.map(_state, sources), "checking data", len(sources), disable=None, leave=False))
    return [f"{source.path}: {state}" for source, state in zip(sources, states, strict=True) if state]


def _state(source: Source) -> str:
    """Return how a file differs from its record; empty if it does not."""
    path = local_path(source.path)
    if not path.is_file():
        return "missing"
    if path.stat().st_size != source.bytes:
        return f"{source.bytes} bytes, now {path.stat().st_size}"
    if source.sha256.startswith(CRC):
        same = source.sha256 == f"{CRC}{open_store(path.parent).manifest.crc32:08x}"
    else:
        same = not source.sha256 or source.sha256 == short_hash(path)
    return "" if same else "changed"


def _changes(then: Mapping[str, Any], now: Mapping[str, Any], keys: Sequence[str]) -> Iterator[str]:
    for key in keys:
        one, other = then.get(key), now.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            yield from _changes(one, other, sorted(one.keys() | other.keys()))
        elif one != other:
            yield f"{key}: {one}, now {other}"
