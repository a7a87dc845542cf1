"""Table 4: plain, SE and CBAM on eight networks."""

from cbam.studies.study import Arm, Study

# network, its name here, and the paper's (top-1, top-5) error for plain, SE and CBAM
_PRINTED = (
    ("ResNet18", "resnet18", (29.60, 10.55), (29.41, 10.22), (29.27, 10.09)),
    ("ResNet34", "resnet34", (26.69, 8.60), (26.13, 8.35), (25.99, 8.24)),
    ("ResNet50", "resnet50", (24.56, 7.50), (23.14, 6.70), (22.66, 6.31)),
    ("ResNet101", "resnet101", (23.38, 6.88), (22.35, 6.19), (21.51, 5.69)),
    ("WideResNet18 (x1.5)", "wide_resnet18_1.5", (26.85, 8.88), (26.21, 8.47), (26.10, 8.43)),
    ("WideResNet18 (x2.0)", "wide_resnet18_2.0", (25.63, 8.20), (24.93, 7.65), (24.84, 7.63)),
    ("ResNeXt50 32x4d", "resnext50_32x4d", (22.85, 6.48), (21.91, 6.04), (21.92, 5.91)),
    ("ResNeXt101 32x4d", "resnext101_32x4d", (21.54, 5.75), (21.17, 5.66), (21.07, 5.59)),
)


def _rows() -> dict[str, Arm]:
    rows = {}
    for label, name, plain, se, cbam in _PRINTED:
        rows[name] = Arm(label, network=name, paper=plain)
        rows[f"{name}+se"] = Arm(f"{label} + SE", "se", name, (name,), paper=se)
        rows[f"{name}+cbam"] = Arm(f"{label} + CBAM", "cbam", name, (name, f"{name}+se"), paper=cbam)
    return rows


STUDY = Study(
    "networks",
    "Plain, SE and CBAM on the paper's networks",
    _rows(),
    notes=("The paper's numbers: table 4, ImageNet-1k, single crop.",),
    small=tuple(name for name in _rows() if name.startswith(("resnet18", "resnet34", "resnet50"))),
)
