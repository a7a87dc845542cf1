"""See what and where a network attends: recorded gates, Grad-CAM, and figures of them."""

from cbam.explain.comparison import compare_rows
from cbam.explain.figure import Row, comparison_figure
from cbam.explain.maps import energy_inside, gradcam
from cbam.explain.recording import Refinement, record

__all__ = ["Refinement", "Row", "compare_rows", "comparison_figure", "energy_inside", "gradcam", "record"]
