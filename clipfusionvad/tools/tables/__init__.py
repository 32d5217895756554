"""Tables over many runs: seeds of a setting, paired comparisons, the store of results."""

from dataclasses import dataclass
from typing import Annotated

from clipfusionvad.io.option import Option

BEST, LAST = "best", "last"
#: Resamples of the test videos; beyond the most, nothing changes but the memory.
RESAMPLES, MOST_RESAMPLES = 2000, 10**5
#: What stored results were tested on.
DEMO, CLIPS, FULL_SET = "demo", "real clips", "full"
DATA = (DEMO, CLIPS, FULL_SET)
#: The unchanged cell of a sweep; the others are compared with it.
FULL = "full"
#: The metrics that ablations compare: ranking metrics of the branches and averages of detection mAP.
HEADLINE = ("auc1", "ap1", "auc2", "ap2", "mauc", "mean_ap", "map_average")
#: The metrics that a comparison of methods shows, of the main branch: not all methods have classes.
OF_METHODS = ("auc1", "ano_auc1", "ap1", "ap_trapezoid1", "far1")
#: Of HEADLINE, the ones that an overview shows of every run.
OVERVIEW = ("auc1", "ap1", "map_average")
ROWS, FORMATS = ("method", "dataset", "cell"), ("markdown", "latex", "csv")

_ROWS = "default: cell for several settings of one method, else method"
_VIDEOS = "resamples of the test videos; 0: none"
_METRICS = f"such as {', '.join(HEADLINE)} or map@0.1"
_REFERENCE = f"setting (name or folder) to compare with, video by video (with --rows cell: '{FULL}', else the first)"


@dataclass(frozen=True)
class TableOptions:
    """What a table shows."""

    rows: Annotated[str | None, Option(_ROWS, choices=ROWS)] = None
    metrics: Annotated[list[str] | None, Option(_METRICS, metavar="METRIC", nonempty=True)] = None
    weights: Annotated[str, Option("of which checkpoint", choices=(BEST, LAST, "both"))] = "both"
    reference: Annotated[str | None, Option(_REFERENCE, metavar="RUN")] = None
    bootstrap: Annotated[int, Option(_VIDEOS, minimum=0, maximum=MOST_RESAMPLES, metavar="N")] = RESAMPLES
    bootstrap_seed: Annotated[int, Option("seed of the resamples", minimum=0, metavar="N")] = 0
    format: Annotated[str, Option("of what is printed and of --output; latex: one table", choices=FORMATS)] = FORMATS[0]
