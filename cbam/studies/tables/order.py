"""Table 3: which gate comes first, or both in parallel? Compared with squeeze-and-excitation."""

from cbam.studies.study import Arm, Study

STUDY = Study(
    "order",
    "The arrangement of the two gates",
    {
        "se": Arm("channel only (SE)", "se", paper=(23.14, 6.70)),
        "channel-spatial": Arm("channel, then spatial (CBAM)", "cbam", against=("se",), paper=(22.66, 6.31)),
        "spatial-channel": Arm(
            "spatial, then channel", "cbam-reversed", against=("se", "channel-spatial"), paper=(22.78, 6.42)
        ),
        "parallel": Arm(
            "channel and spatial in parallel",
            "cbam-parallel",
            against=("se", "channel-spatial"),
            paper=(22.95, 6.59),
        ),
    },
    notes=(
        "The paper's numbers: table 3, ResNet50 on ImageNet-1k.",
        'The paper does not say how "parallel" merges the gates; here both gates of one map multiply it.',
    ),
)
