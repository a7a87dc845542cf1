"""Where a bottleneck block strides: in its 3x3 convolution, or in the 1x1 convolution before it."""

from collections.abc import Iterator

from torch import nn


def stride_in_1x1(model: nn.Module) -> int:
    """Move the stride of every bottleneck block from its 3x3 to its first 1x1 convolution, in place.

    He et al. (CVPR 2016) stride in the 1x1, which the multiply-accumulates of CBAM's tables assume;
    torchvision and CBAM's released code stride in the 3x3. No parameter changes, so weights load either way,
    but compute something else.

    Returns the number of blocks changed; 0 if no block of the network strides in a 3x3.
    """
    blocks = list(_striding_in_3x3(model))
    for first, second in blocks:
        first.stride, second.stride = second.stride, first.stride
    return len(blocks)


def _striding_in_3x3(model: nn.Module) -> Iterator[tuple[nn.Conv2d, nn.Conv2d]]:
    """The 1x1 and the 3x3 convolution of each block 1x1, 3x3, 1x1 that strides in the second."""
    for module in model.modules():
        first, second, third = (getattr(module, f"conv{i}", None) for i in (1, 2, 3))
        if isinstance(first, nn.Conv2d) and isinstance(second, nn.Conv2d) and isinstance(third, nn.Conv2d):
            sides = first.kernel_size, second.kernel_size, third.kernel_size
            if sides == ((1, 1), (3, 3), (1, 1)) and second.stride != (1, 1):
                yield first, second
