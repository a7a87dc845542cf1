"""Progress reports of a training, a comparison or a study."""

from typing import Protocol


class Watch(Protocol):
    """Receives progress reports."""

    def say(self, line: str) -> None:
        """Report a line of lasting interest."""

    def now(self, what: str) -> None:
        """Report what is running from now on."""

    def advance(self, share: float) -> None:
        """Report that another `share` of the whole, out of 1, is done."""

    def skip(self, share: float) -> None:
        """The same for work done earlier, which says nothing about the speed."""


class Silent:
    """A `Watch` that reports nothing."""

    def say(self, line: str) -> None: ...

    def now(self, what: str) -> None: ...

    def advance(self, share: float) -> None: ...

    def skip(self, share: float) -> None: ...
