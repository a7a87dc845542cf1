"""How a page names the commits that its numbers were measured with."""

from collections.abc import Iterable

CHANGED = "+changes"  # suffix of cbam.studies.machine.commit() if files differ from the commit


def commits(rows: Iterable[dict[str, str]]) -> str:
    """The distinct commits of these rows, abbreviated, with the mark of changed files kept."""
    return ", ".join(dict.fromkeys(_short(row["commit"]) for row in rows))


def _short(commit: str) -> str:
    if not commit:
        return "unknown"
    return f"`{commit.removesuffix(CHANGED)[:12]}{CHANGED if commit.endswith(CHANGED) else ''}`"
