"""The metrics of settings as rows: mean and deviation over seeds, an interval, the published figure."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from clipfusionvad.report.table import BRANCHES, RANKING, VARIANTS, PublishedFigure, published_figures
from clipfusionvad.tools.tables import BEST
from clipfusionvad.tools.tables.collect import Setting
from clipfusionvad.tools.tables.compare import student_t

OVER_SEEDS, OVER_VIDEOS = "seeds", "videos"
#: The names of the metrics, in the order of tables.
TITLES = {f"{key}{number}": f"{name}, {branch}" for number, branch in BRANCHES.items() for key, name in RANKING.items()}
TITLES |= {"mauc": "mAUC, class against rest", "mean_ap": "mAP of frames", "map_average": "detection mAP"}
TITLES |= {f"{key}@average": f"  {title.removeprefix('corrected: ')}" for key, title in VARIANTS.items()}


@dataclass(frozen=True)
class MetricRow:
    """A metric of a setting (``cell``) with some ``weights``, in percent: ``mean`` and sample ``std`` over seeds.

    ``low`` and ``high`` bound a 95 % interval; ``interval`` says of what: the mean over seeds (Student's t) or, for a
    single run, the test videos (bootstrap). ``inside`` says whether the ``paper``'s figure lies in it. None means
    unknown.
    """

    cell: str
    method: str
    dataset: str
    data: str
    protocol: str
    weights: str
    metric: str
    mean: float
    std: float | None
    n: int
    low: float | None
    high: float | None
    interval: str | None
    paper: float | None
    source: str | None
    inside: bool | None

    @property
    def measured(self) -> str:
        return f"{self.mean:.2f}" + ("" if self.std is None else f" ± {self.std:.2f}") + f" ({self.n})"

    @property
    def verdict(self) -> str:
        return "not judged" if self.inside is None else "inside" if self.inside else "outside"


VideoInterval = Callable[[Setting, str], tuple[float, float] | None]


def metric_rows(
    settings: Iterable[Setting],
    weights: Sequence[str],
    metrics: Sequence[str],
    over_videos: VideoInterval,
    changed: Sequence[str] = (),
) -> list[MetricRow]:
    """Return the rows of all settings; a metric that one of a setting's seeds lacks has no row.

    ``over_videos`` returns the interval of a single run's best weights. Made-up data and the settings in ``changed``
    get no published figure.
    """
    figures = published_figures()
    rows = []
    for setting in settings:
        for metric in metrics:
            figure = None if setting.demo or setting.name in changed else _figure(figures, setting, metric)
            scale = 1 if metric.startswith("map") else 100
            for kind in weights:
                found = [result.metrics.get(kind, {}).get(metric) for result in setting.results]
                values = [scale * value for value in found if value is not None]
                if len(values) == len(found):
                    rows.append(_row(setting, metric, kind, values, figure, over_videos))
    return rows


def _row(
    setting: Setting,
    metric: str,
    weights: str,
    values: list[float],
    figure: PublishedFigure | None,
    over_videos: VideoInterval,
) -> MetricRow:
    several = student_t(values)
    bounds = several[:2] if several else over_videos(setting, metric) if weights == BEST else None
    low, high = bounds or (None, None)
    paper = figure.percent if figure else None
    return MetricRow(
        setting.name, setting.method, setting.dataset, setting.data, setting.protocol, weights, metric,
        mean=float(np.mean(values)),
        std=float(np.std(values, ddof=1)) if several else None,
        n=len(values),
        low=low,
        high=high,
        interval=(OVER_SEEDS if several else OVER_VIDEOS) if bounds else None,
        paper=paper,
        source=figure.source if figure else None,
        inside=None if paper is None or bounds is None else bounds[0] <= paper <= bounds[1],
    )  # fmt: skip


def _figure(figures: Sequence[PublishedFigure], setting: Setting, metric: str) -> PublishedFigure | None:
    """Find the published figure of a metric; papers report detection mAP by the released procedure."""
    if metric == "map_average" and setting.protocol != "paper":
        return None
    wanted = "map_average" if metric == "map_released@average" else metric
    key = (setting.method, setting.dataset, wanted)
    return next((figure for figure in figures if (figure.method, figure.dataset, figure.metric) == key), None)
