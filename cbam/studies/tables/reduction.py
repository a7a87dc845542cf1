"""How narrow can the hidden layer of the channel gate be? The paper uses C/16 throughout."""

from cbam.studies.study import Arm, Study

RATIOS = (4, 8, 16, 32)


def _rows() -> dict[str, Arm]:
    rows = {"plain": Arm("plain")}
    for r in RATIOS:
        against = ("plain",) if r == 16 else ("plain", "r16")
        # 16 is CBAM's default; as None, the settings equal those of other tables, whose runs are reused.
        own = None if r == 16 else r
        rows[f"r{r}"] = Arm(f"CBAM, r = {r}", "cbam", against=against, reduction=own)
    return rows


STUDY = Study(
    "reduction",
    "CBAM's reduction ratio",
    _rows(),
    notes=("The paper has no table for this.", "A layer has at least one hidden unit."),
)
