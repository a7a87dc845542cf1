"""Table 3: which gate first, or both at once? The tables compare with squeeze-and-excitation."""

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
        'How "parallel" merges is not printed there; here it is the product of both gates of the same map.',
    ),
)
