"""Checks of the model file and the normal centroid that the options name beside the data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from clipfusionvad.engine.checkpoint import check_method, read_model_file
from clipfusionvad.tools.doctor.findings import ERROR, WARNING, Finding
from clipfusionvad.tools.doctor.survey import Survey


def model_file(survey: Survey) -> Iterator[Finding]:
    """The model file is damaged, of another method, of another dataset, or knows other classes."""
    path, dataset = survey.options.model_path, survey.dataset
    if not Path(path).is_file():
        return
    file = read_model_file(path)
    check_method(file, survey.options.method)
    if not file.made:
        return
    if file.made["dataset"] != dataset.name:
        what = f"it was trained on {file.made['dataset']}, not on {dataset.name}"
        yield Finding(ERROR, what, str(path), advice="give the model of this dataset with --model-path")
    elif list(file.made.get("classes", dataset.classes)) != dataset.labels:
        yield Finding(ERROR, "it knows other classes than the dataset has now", str(path), advice="train again")
    told, used = file.made.get("frames_per_snippet"), survey.options.frames_per_snippet
    if told and told != used:
        what = f"it was trained with --frames-per-snippet {told}, now it is {used}"
        yield Finding(WARNING, what, str(path), advice="a test takes what the file says")


def calibration_file(survey: Survey) -> Iterator[Finding]:
    """The normal centroid file in the options does not exist."""
    path = survey.options.normal_centroid
    if path and not Path(path).is_file():
        yield Finding(ERROR, f"normal centroid file not found: {path}", advice="give the calibration.pt of a run")


CHECKS = (model_file, calibration_file)
