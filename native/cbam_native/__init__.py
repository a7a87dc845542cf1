"""CPU kernels of `cbam`, a compiled library on libtorch's stable ABI.

`cbam` finds and loads it; there is nothing to call here.
"""

from pathlib import Path

__version__ = "0.1.0"
OPERATORS = 1  # the version of the schemas in cbam/ops/library.py that the library implements


def library() -> str:
    """The path of the compiled library, for `torch.ops.load_library`."""
    return str(Path(__file__).parent / "kernels.so")


def sources() -> str:
    """The digest of the sources that the library was compiled from; see `compile.py`."""
    return (Path(__file__).parent / "kernels.sha256").read_text()
