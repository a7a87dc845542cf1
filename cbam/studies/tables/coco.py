"""Table 6: Faster R-CNN on COCO; on smaller data sets with ResNet18 and a feature pyramid, and also with SE.

The paper does not say which variant of Faster R-CNN it uses. Its 27.0 AP with ResNet50 is typical of the C4
variant, without a pyramid (He et al., arXiv 1512.03385, have 27.2 with ResNet101); with a pyramid, ResNet50
has 33.9 (Lin et al., arXiv 1612.03144). So the rows with the paper's numbers are of the C4 variant.
"""

from cbam.studies.study import LARGE_COCO, Arm, Measure, Study, faster_rcnn

_SMALL = "fasterrcnn:resnet18"
# network, and the paper's (AP, AP50, AP75) for plain and CBAM
_PRINTED = (
    ("ResNet50", "resnet50", (27.0, 46.2, 28.1), (28.1, 48.2, 29.2)),
    ("ResNet101", "resnet101", (29.1, 48.4, 30.7), (30.8, 50.5, 32.6)),
)


def _rows() -> dict[str, Arm]:
    rows = {}
    for label, name, plain, cbam in _PRINTED:
        network = f"fasterrcnn_c4:{name}"
        rows[name] = Arm(f"{label}-C4", network=network, paper=plain)
        rows[f"{name}+cbam"] = Arm(f"{label}-C4 + CBAM", "cbam", network, (name,), paper=cbam)
    for label, name, *_ in _PRINTED:
        plain, network = f"{name}-fpn", f"fasterrcnn:{name}"
        rows[plain] = Arm(f"{label}-FPN", network=network)
        rows[f"{plain}+cbam"] = Arm(f"{label}-FPN + CBAM", "cbam", network, (plain,))
    rows["resnet18"] = Arm("ResNet18-FPN", network=_SMALL)
    for attention, label in (("se", "SE"), ("cbam", "CBAM")):
        against = ("resnet18",) if attention == "se" else ("resnet18", "resnet18+se")
        rows[f"resnet18+{attention}"] = Arm(f"ResNet18-FPN + {label}", attention, _SMALL, against)
    return rows


STUDY = Study(
    "coco",
    "Faster R-CNN, plain and with attention",
    _rows(),
    notes=(
        "The paper's numbers: table 6, COCO, from ImageNet weights. C4 is the original variant: one map of "
        "stride 16, and the last stage as the head of every box. FPN is the feature pyramid.",
        "AP is the mean over IoU 0.50 to 0.95; on data in VOC's format by the VOC 2010 metric.",
    ),
    large=tuple(name for name, arm in _rows().items() if arm.paper),
    small=tuple(name for name in _rows() if name.startswith("resnet18")),
    measures=(
        Measure("val_ap", "AP", lower_is_better=False),
        Measure("val_ap50", "AP50", lower_is_better=False),
        Measure("val_ap75", "AP75", lower_is_better=False),
    ),
    large_from=LARGE_COCO,
    usual=faster_rcnn,
    boxed=True,
    paper_data="COCO",
)
