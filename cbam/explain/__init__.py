"""What and where a network attends: recorded gates, class activation maps, and figures of both."""

from cbam.explain.comparison import compare_rows
from cbam.explain.detecting import Detection, Detectors, Finds, detect, gradcam_of_box
from cbam.explain.figure import Row, comparison_figure
from cbam.explain.looking import Glance, Look, Viewer, default_viewer, look
from cbam.explain.maps import energy_inside, gradcam
from cbam.explain.outlines import detection_figure
from cbam.explain.recording import Refinement, Step, record
from cbam.explain.sheet import look_figure
from cbam.explain.stages import stages_figure

__all__ = [
    "Detection",
    "Detectors",
    "Finds",
    "Glance",
    "Look",
    "Refinement",
    "Row",
    "Step",
    "Viewer",
    "compare_rows",
    "comparison_figure",
    "default_viewer",
    "detect",
    "detection_figure",
    "energy_inside",
    "gradcam",
    "gradcam_of_box",
    "look",
    "look_figure",
    "record",
    "stages_figure",
]
