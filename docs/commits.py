"""How a page names the code that its numbers were measured with."""

from collections.abc import Iterable

CHANGED = "+changes"  # as cbam.studies.machine.commit() ends where files differ from the commit


def commits(rows: Iterable[dict[str, str]]) -> str:
    """The commits of these rows, in short and each once; one whose files were changed still says so."""
    return ", ".join(dict.fromkeys(_short(row["commit"]) for row in rows))


def _short(commit: str) -> str:
    if not commit:
        return "unknown"
    return f"`{commit.removesuffix(CHANGED)[:12]}{CHANGED if commit.endswith(CHANGED) else ''}`"
