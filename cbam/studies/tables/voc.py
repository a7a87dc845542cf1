"""Table 7: SSD and StairNet at 300 x 300 on Pascal VOC."""

from cbam.studies.study import LARGE_VOC, Arm, Measure, Study, single_shot

# backbone, its name here, and the paper's mAP for SSD, StairNet, StairNet + SE, StairNet + CBAM
_PRINTED = (
    ("VGG16", "vgg16", (77.8, 78.9, 79.1, 79.3)),
    ("MobileNet", "mobilenet_v1", (68.1, 70.1, 70.0, 70.5)),
)


def _rows() -> dict[str, Arm]:
    rows = {}
    for label, name, (ssd, stairs, se, cbam) in _PRINTED:
        first, plain, network = f"ssd-{name}", f"stairnet-{name}", f"stairnet300:{name}"
        rows[first] = Arm(f"SSD, {label}", network=f"ssd300:{name}", paper=(ssd,))
        rows[plain] = Arm(f"StairNet, {label}", "", network, (first,), paper=(stairs,))
        rows[f"{plain}+se"] = Arm(f"StairNet, {label} + SE", "se", network, (plain,), paper=(se,))
        rows[f"{plain}+cbam"] = Arm(
            f"StairNet, {label} + CBAM", "cbam", network, (plain, f"{plain}+se"), paper=(cbam,)
        )
    return rows


STUDY = Study(
    "voc",
    "SSD and StairNet at 300 x 300, plain and with attention before the classifiers",
    _rows(),
    notes=(
        "The paper's numbers: table 7, trained on VOC 07+12 trainval from ImageNet weights, VOC2007 test. It "
        "does not say which metric; here it is that of VOC 2007, the mean precision at 11 points of recall.",
    ),
    small=tuple(
        name for name in _rows() if name.endswith(("mobilenet_v1", "+se", "+cbam")) and "vgg" not in name
    ),
    measures=(
        Measure("val_ap50_11points", "mAP at 11 points", lower_is_better=False),
        Measure("val_ap50", "mAP by area", lower_is_better=False),
    ),
    large_from=LARGE_VOC,
    usual=single_shot,
    boxed=True,
    rules="voc",
    paper_data="VOC2007",
)
