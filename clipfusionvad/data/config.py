"""Options of lists, features and truth."""

from dataclasses import dataclass
from typing import Annotated

from clipfusionvad.io.option import Option, layers, size

#: Frames that one row of features covers, unless an option says otherwise.
FRAMES_PER_SNIPPET = 16
#: Help of the option of that name.
SEGMENTS = (
    "fixed: a feature row covers --frames-per-snippet frames; equal: it covers an equal part of its video, "
    "whose number of frames the annotation gives"
)
#: The value of ``gt_path`` for test videos without annotation.
NO_TRUTH = "none"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the data is and how it is read."""

    train_list: Annotated[str, Option("CSV (path,label) of training features")]
    test_list: Annotated[str, Option("CSV (path,label) of test features")]
    gt_path: Annotated[
        str,
        Option(
            "frame-level truth (.npy), or one keyed annotation file (.csv, .json, .mat) or folder of frame masks, "
            "or 'none' to judge only whole videos"
        ),
    ]
    gt_segment_path: Annotated[str, Option("segments of each test video (.npy)")]
    gt_label_path: Annotated[str, Option("labels of those segments (.npy)")]
    feature_root: Annotated[str | None, Option("folder of features that are not where the list says")] = None
    stream_folders: Annotated[
        tuple[str, ...] | None,
        Option("word in the folder name of each feature stream; lists name files of the first", nonempty=True),
    ] = None
    frames_per_snippet: Annotated[int, size("frames that one feature row covers")] = FRAMES_PER_SNIPPET
    segments: Annotated[str | None, Option(f"{SEGMENTS} (default: fixed)", choices=("fixed", "equal"))] = None
    convention: Annotated[
        str | None,
        Option(
            "which frames are judged and how text annotations are read: docs/datasets.md (default: as the truth is)"
        ),
    ] = None
    test_crops: Annotated[
        str,
        Option(
            "score the listed crop of a test video, or the mean over all files NAME__k.npy beside it",
            choices=("listed", "all"),
        ),
    ] = "listed"
    check: Annotated[bool, Option("read and check every feature before the start")] = True
    packed: Annotated[bool, Option("use the features packed by 'pack', where there are any")] = True
    packed_dir: Annotated[str | None, Option("the --output folder of 'pack' (default: beside the lists)")] = None
    workers: Annotated[
        int | None,
        layers("processes that load training features that are not packed (default: none on a CPU, up to 8 for a GPU)"),
    ] = None

    @property
    def stride(self) -> int | None:
        """Frames that a feature row covers; None for an equal part of its video."""
        return None if self.segments == "equal" else self.frames_per_snippet
