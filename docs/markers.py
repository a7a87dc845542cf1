"""Generated text in hand-written pages, between two comments."""


def between(page: str, begin: str, end: str, shown: str) -> str:
    """`page` with the text between the two markers replaced."""
    before, rest = page.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n{shown}\n{end}{after}"
