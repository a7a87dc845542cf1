"""See what and where a network attends: recorded gates, class activation maps, and figures of them."""

from cbam.explain.comparison import compare_rows
from cbam.explain.figure import Row, comparison_figure
from cbam.explain.looking import Glance, Look, Viewer, default_viewer, look
from cbam.explain.maps import energy_inside, gradcam
from cbam.explain.recording import Refinement, Step, record
from cbam.explain.sheet import look_figure
from cbam.explain.stages import stages_figure

__all__ = [
    "Glance",
    "Look",
    "Refinement",
    "Row",
    "Step",
    "Viewer",
    "compare_rows",
    "comparison_figure",
    "default_viewer",
    "energy_inside",
    "gradcam",
    "look",
    "look_figure",
    "record",
    "stages_figure",
]
