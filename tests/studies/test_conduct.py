"""What a study is filled with: rows, the networks that they go on from, pictures that it can score."""

import dataclasses

from cbam.studies.conduct import conduct, find_pictures, prepare
from cbam.studies.records import Records
from cbam.studies.study import digits
from cbam.studies.tables import STUDIES
from cbam.studies.tabulate import tables

TINY = {"epochs": 1, "batch_size": 16}


def study(out, name, **changes):
    own = TINY | changes
    return prepare(name, find_pictures("digits", own), own, out=str(out), device="cpu")


def test_a_few_pictures_of_a_large_set_fill_the_rows_that_their_table_counts(tmp_path, monkeypatch):
    large = dataclasses.replace(
        STUDIES["channel"], whole=1000, small=("plain",), large=("plain", "avg", "max"),
        usual=lambda _, train, __: dataclasses.replace(digits(), small=train < 1000),
    )  # fmt: skip
    monkeypatch.setitem(STUDIES, "channel", large)
    assert list(study(tmp_path, "channel").arms) == ["plain", "avg", "max"]
    few = study(tmp_path, "channel", limit=20)
    assert conduct(few, seeds=1) == 0
    (table,) = tables(large, Records(tmp_path, "channel").all().values())
    assert list(table.arms) == list(few.arms) == ["plain"]
