"""The progress of a training, a comparison or a study."""

from typing import Protocol


class Watch(Protocol):
    """Is kept informed while it runs."""

    def say(self, line: str) -> None:
        """A line of lasting interest."""

    def now(self, what: str) -> None:
        """What is running from here on."""

    def advance(self, share: float) -> None:
        """Another `share` of the whole, out of 1, is done."""

    def skip(self, share: float) -> None:
        """The same of work that was done earlier, which says nothing of the speed."""


class Silent:
    """A `Watch` that tells nobody."""

    def say(self, line: str) -> None: ...

    def now(self, what: str) -> None: ...

    def advance(self, share: float) -> None: ...

    def skip(self, share: float) -> None: ...
