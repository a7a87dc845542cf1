"""Networks for other runtimes: torch.export, ONNX and OpenVINO files, checked before they are in place."""

from cbam.portable.check import Agreement
from cbam.portable.exporting import Exported, export

__all__ = ["Agreement", "Exported", "export"]
