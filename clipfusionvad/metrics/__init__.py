"""What the papers report: frame-level ranking metrics and fine-grained detection mAP."""

from clipfusionvad.metrics.detection import IOUS, DetectionResult, corrected_detection_map, detection_map
from clipfusionvad.metrics.frame import (
    ClassMetrics,
    class_metrics,
    count_frames,
    frame_metrics,
    snippet_metrics,
    video_score,
)

__all__ = [
    "IOUS",
    "ClassMetrics",
    "DetectionResult",
    "class_metrics",
    "corrected_detection_map",
    "count_frames",
    "detection_map",
    "frame_metrics",
    "snippet_metrics",
    "video_score",
]
