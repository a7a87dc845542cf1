"""How narrow may the hidden layer of the channel gate be? The paper takes C/16 throughout."""

from cbam.studies.study import Arm, Study

RATIOS = (4, 8, 16, 32)


def _rows() -> dict[str, Arm]:
    rows = {"plain": Arm("plain")}
    for r in RATIOS:
        against = ("plain",) if r == 16 else ("plain", "r16")
        # 16 is CBAM's default; left unsaid, its runs are those of the other tables.
        own = None if r == 16 else r
        rows[f"r{r}"] = Arm(f"CBAM, r = {r}", "cbam", against=against, reduction=own)
    return rows


STUDY = Study(
    "reduction",
    "CBAM's reduction ratio",
    _rows(),
    notes=("The paper prints no table of this.", "A layer has at least one hidden unit."),
)
