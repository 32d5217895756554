"""All analyses, by what they read. A function's name is that of the analysis, its keywords are its options."""

from __future__ import annotations

from collections.abc import Callable

from clipfusionvad.io.option import Declared, declared_options
from clipfusionvad.tools.analysis.alarms import alarms, latency
from clipfusionvad.tools.analysis.attention import attention
from clipfusionvad.tools.analysis.calibration import calibration
from clipfusionvad.tools.analysis.classes import classes, confusion
from clipfusionvad.tools.analysis.gates import gates
from clipfusionvad.tools.analysis.graph import graph
from clipfusionvad.tools.analysis.prompts import prompts
from clipfusionvad.tools.analysis.result import AnalysisResult
from clipfusionvad.tools.analysis.transfer import transfer

Analysis = Callable[..., AnalysisResult]
#: Analyses of a test's scores with their truth, of a model and its test set, and of the models of several runs.
FROM_SCORES: tuple[Analysis, ...] = (classes, confusion, alarms, latency, calibration)
FROM_MODEL: tuple[Analysis, ...] = (prompts, gates, graph, attention)
FROM_RUNS: tuple[Analysis, ...] = (transfer,)
ANALYSES = {analysis.__name__: analysis for analysis in (*FROM_SCORES, *FROM_MODEL, *FROM_RUNS)}


def summary(analysis: Analysis) -> str:
    """Return the first line of an analysis' docstring."""
    return (analysis.__doc__ or "").splitlines()[0].rstrip(".")


def options(analysis: Analysis) -> list[Declared]:
    """Return the options that an analysis declares."""
    return list(declared_options(analysis).values())
