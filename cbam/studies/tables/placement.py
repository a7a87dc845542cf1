"""Where CBAM is put: in every residual block as in the paper, in one stage, or after the stages."""

from cbam.studies.study import Arm, Study

_STAGES = {"first": ("layer1", "the first stage"), "second": ("layer2", "the second stage"),
           "third": ("layer3", "the third stage")}  # fmt: skip


def _rows() -> dict[str, Arm]:
    rows = {"plain": Arm("plain"), "every": Arm("CBAM in every block", "cbam", against=("plain",))}
    for name, (layer, told) in _STAGES.items():
        where = rf"{layer}\.\d+"
        rows[name] = Arm(f"CBAM in {told} alone", "cbam", against=("plain", "every"), where=where)
    rows["after"] = Arm("CBAM after every stage", "cbam", against=("plain", "every"), where=r"layer\d")
    return rows


STUDY = Study(
    "placement",
    "Where CBAM is put",
    _rows(),
    notes=("The paper prints no table of this.",),
)
