"""Every attention module of `cbam.nn` on one network."""

from cbam.studies.report import LABELS
from cbam.studies.settings import ATTENTION
from cbam.studies.study import Arm, Study

_PAPER = {"se": (23.14, 6.70), "channel": (22.80, 6.52), "cbam": (22.66, 6.31)}


def _rows() -> dict[str, Arm]:
    rows = {"plain": Arm("plain", paper=(24.56, 7.50))}
    for name in ATTENTION:
        rows[name] = Arm(LABELS[name], name, against=("plain",), paper=_PAPER.get(name))
    return rows


STUDY = Study(
    "peers",
    "The attention modules of cbam.nn on one network",
    _rows(),
    notes=(
        "The paper's numbers: tables 1 and 2, ResNet50 on ImageNet-1k; it has none for the other modules.",
    ),
)
