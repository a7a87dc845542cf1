"""Where CBAM is placed: in every residual block as in the paper, in one stage, or after every stage."""

from cbam.studies.study import Arm, Study

_STAGES = {"first": ("layer1", "the first stage"), "second": ("layer2", "the second stage"),
           "third": ("layer3", "the third stage")}  # fmt: skip


def _rows() -> dict[str, Arm]:
    rows = {"plain": Arm("plain"), "every": Arm("CBAM in every block", "cbam", against=("plain",))}
    for name, (layer, stage) in _STAGES.items():
        where = rf"{layer}\.\d+"
        rows[name] = Arm(f"CBAM in {stage} only", "cbam", against=("plain", "every"), where=where)
    rows["after"] = Arm("CBAM after every stage", "cbam", against=("plain", "every"), where=r"layer\d")
    return rows


STUDY = Study(
    "placement",
    "The placement of CBAM",
    _rows(),
    notes=("The paper has no table for this.",),
)
