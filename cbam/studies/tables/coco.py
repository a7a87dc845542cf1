"""Table 6: Faster R-CNN on COCO; on smaller data sets over ResNet18, with SE too."""

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
        network = f"fasterrcnn:{name}"
        rows[name] = Arm(f"Faster R-CNN, {label}", network=network, paper=plain)
        rows[f"{name}+cbam"] = Arm(f"Faster R-CNN, {label} + CBAM", "cbam", network, (name,), paper=cbam)
    rows["resnet18"] = Arm("Faster R-CNN, ResNet18", network=_SMALL)
    for attention, label in (("se", "SE"), ("cbam", "CBAM")):
        against = ("resnet18",) if attention == "se" else ("resnet18", "resnet18+se")
        rows[f"resnet18+{attention}"] = Arm(f"Faster R-CNN, ResNet18 + {label}", attention, _SMALL, against)
    return rows


STUDY = Study(
    "coco",
    "Faster R-CNN with a feature pyramid, plain and with attention",
    _rows(),
    notes=(
        "The paper's numbers: table 6, COCO; its Faster R-CNN has no feature pyramid, and its networks begin "
        "with their weights from ImageNet.",
        "AP is the mean over overlaps of 0.50 to 0.95; on VOC's kind of data by VOC's rules of 2010.",
    ),
    large=tuple(name for name in _rows() if not name.startswith("resnet18")),
    small=tuple(name for name in _rows() if name.startswith("resnet18")),
    measures=(
        Measure("val_ap", "AP", lower_is_better=False),
        Measure("val_ap50", "AP50", lower_is_better=False),
        Measure("val_ap75", "AP75", lower_is_better=False),
    ),
    whole=LARGE_COCO,
    usual=faster_rcnn,
    boxed=True,
    paper_data="COCO",
)
