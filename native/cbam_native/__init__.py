"""CPU kernels of `cbam`, a compiled library on libtorch's stable ABI.

`cbam` finds and loads it by itself; there is nothing to call here.
"""

from pathlib import Path

__version__ = "0.1.0"


def library() -> str:
    """The path of the compiled library, for `torch.ops.load_library`."""
    return str(Path(__file__).parent / "kernels.so")
