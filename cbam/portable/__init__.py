"""Export networks to torch.export, ONNX and OpenVINO files, each checked before it is put in place."""

from cbam.portable.check import Agreement
from cbam.portable.exporting import Exported, export

__all__ = ["Agreement", "Exported", "export"]
