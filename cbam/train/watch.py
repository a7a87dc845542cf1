"""Who is told how a training, a comparison or a study goes."""

from typing import Protocol


class Watch(Protocol):
    """What is told while it runs."""

    def say(self, line: str) -> None:
        """A line of lasting interest."""

    def now(self, what: str) -> None:
        """What is running from here on."""

    def advance(self, share: float) -> None:
        """How much more of the whole, out of 1, is done."""

    def skip(self, share: float) -> None:
        """How much of the whole was done before: it says nothing of how long the rest takes."""


class Silent:
    """A `Watch` that tells nobody."""

    def say(self, line: str) -> None: ...

    def now(self, what: str) -> None: ...

    def advance(self, share: float) -> None: ...

    def skip(self, share: float) -> None: ...
