"""Which implementation computes the operations."""

from collections.abc import Iterator
from contextlib import contextmanager

from cbam.errors import ConfigError


@contextmanager
def using(implementation: str) -> Iterator[None]:
    """Compute attention inside the `with` block by "reference" or by "fused".

    The default, outside any block, is the fastest that the input allows. An explicit choice never falls
    back: "fused" is refused where no fused kernel exists, which in this version is everywhere.

    Raises:
        ConfigError: an unknown implementation, or one that this version does not have.
    """
    if implementation == "fused":
        raise ConfigError(
            'using("fused"): this version has no fused kernels; leave the choice out or take "reference"'
        )
    if implementation != "reference":
        raise ConfigError(f'using({implementation!r}): expected "reference" or "fused"')
    yield
