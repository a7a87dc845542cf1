"""Table 2: which descriptor and kernel size for spatial attention after channel attention?"""

from cbam.studies.study import Arm, Study

STUDY = Study(
    "spatial",
    "Spatial attention on top of channel attention",
    {
        "channel": Arm("channel only", "channel", paper=(22.80, 6.52)),
        "conv3": Arm(
            "+ spatial, 1x1 convolution, k = 3", "cbam-conv3", against=("channel",), paper=(22.96, 6.64)
        ),
        "conv7": Arm(
            "+ spatial, 1x1 convolution, k = 7", "cbam-conv7", against=("channel",), paper=(22.90, 6.47)
        ),
        "pool3": Arm(
            "+ spatial, average and maximum, k = 3", "cbam-k3", against=("channel",), paper=(22.68, 6.41)
        ),
        "pool7": Arm(
            "+ spatial, average and maximum, k = 7",
            "cbam",
            against=("channel", "conv7", "pool3"),
            paper=(22.66, 6.31),
        ),
    },
    notes=("The paper's numbers: table 2, ResNet50 on ImageNet-1k.",),
)
