"""tests/FAULTS.md matches the tests, every row has a test or a reason, and every grave row has a test."""

from docs import fill_faults


def test_the_fault_page_is_up_to_date():
    assert fill_faults.PAGE.read_text("utf-8") == fill_faults.page(), (
        "make faults, or python -m docs.fill_faults"
    )


def test_every_row_has_a_test_or_a_reason():
    told, tests = fill_faults.read(), fill_faults.covered()
    rows = fill_faults.rows(told)
    assert len(rows) == 184
    assert {row for row in rows if row not in tests} == set(told["left"]), "covered or left, not both"
    assert set(tests) <= set(rows), "a test names an unknown row"
    assert all(told["left"].values())


def test_every_grave_row_has_a_test():
    told, tests = fill_faults.read(), fill_faults.covered()
    assert not [row for row in fill_faults.grave(told) if row not in tests]


def test_a_comment_belongs_to_the_test_that_contains_or_follows_it():
    source = """
CASES = [1]  # C1: a table


@decorator
def test_one():
    x = 1  # R6, T17


# K3
def test_two():
    \"\"\"K4\"\"\"
"""
    assert sorted(fill_faults.named(source)) == [
        ("C1", "test_one"), ("K3", "test_two"), ("K4", "test_two"), ("R6", "test_one"), ("T17", "test_one"),
    ]  # fmt: skip
