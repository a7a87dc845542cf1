"""Table 1: average or max pooling, or both, in channel attention?"""

from cbam.studies.study import Arm, Study

STUDY = Study(
    "channel",
    "Channel attention with average pooling, max pooling, or both",
    {
        "plain": Arm("plain", paper=(24.56, 7.50)),
        "avg": Arm("+ average (= SE)", "se", against=("plain",), paper=(23.14, 6.70)),
        "max": Arm("+ maximum", "cbam-max", against=("plain", "avg"), paper=(23.20, 6.83)),
        "both": Arm("+ average and maximum", "channel", against=("plain", "avg"), paper=(22.80, 6.52)),
    },
    notes=("The paper's numbers: table 1, ResNet50 on ImageNet-1k.",),
)
