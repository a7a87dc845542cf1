"""The identity start against the paper's initialisation, from scratch and on a trained network."""

from cbam.studies.study import Arm, Study

STUDY = Study(
    "start",
    "The start of CBAM: as the identity, or initialised as in the paper",
    {
        "plain": Arm("from scratch: plain"),
        "paper": Arm("from scratch: CBAM, paper's start", "cbam", against=("plain",)),
        "identity": Arm(
            "from scratch: CBAM, identity start", "cbam", against=("plain", "paper"), start="identity"
        ),
        "forked-plain": Arm("trained, then: plain", forked=True),
        "forked-paper": Arm(
            "trained, then: CBAM, paper's start", "cbam", against=("forked-plain",), forked=True
        ),
        "forked-identity": Arm(
            "trained, then: CBAM, identity start",
            "cbam",
            against=("forked-plain", "forked-paper"),
            start="identity",
            forked=True,
        ),
    },
    notes=(
        "The paper has no table for this.",
        '"trained, then": a plain network is trained, CBAM is attached to it, and it is trained for as many '
        "epochs again, as is the plain one.",
    ),
)
