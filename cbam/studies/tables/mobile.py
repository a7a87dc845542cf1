"""Table 5: MobileNet V1 at two widths, attention after every convolution."""

from cbam.studies.study import Arm, Study

_PRINTED = (
    ("0.7", "mobilenet_v1_0.7", (34.86, 13.69), (32.50, 12.49), (31.51, 11.48)),
    ("1.0", "mobilenet_v1", (31.39, 11.51), (29.97, 10.63), (29.01, 9.99)),
)


def _rows() -> dict[str, Arm]:
    rows = {}
    for width, name, plain, se, cbam in _PRINTED:
        label = f"MobileNet V1, width {width}"
        rows[width] = Arm(label, network=name, paper=plain)
        rows[f"{width}+se"] = Arm(f"{label} + SE", "se", name, (width,), paper=se)
        rows[f"{width}+cbam"] = Arm(f"{label} + CBAM", "cbam", name, (width, f"{width}+se"), paper=cbam)
    return rows


STUDY = Study(
    "mobile",
    "Plain, SE and CBAM on MobileNet V1",
    _rows(),
    notes=("The paper's numbers: table 5, ImageNet-1k.",),
)
