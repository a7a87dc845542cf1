"""`cbam study`: from a study and a data set to runs, records, tables and figures."""

import contextlib
import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cbam.data.parquet import check_output_folder
from cbam.errors import ConfigError
from cbam.studies.boxes import BoxedPictures
from cbam.studies.drawing import figure
from cbam.studies.filling import Filling
from cbam.studies.printing import markdown, text
from cbam.studies.records import Records
from cbam.studies.study import DIGITS, SEEDS, Study
from cbam.studies.tables import STUDIES
from cbam.studies.tabulate import tables
from cbam.studies.training import Pictures, Training
from cbam.train import pick_device
from cbam.train.watch import Watch


def find_study(name: str) -> Study:
    """The study of that name.

    Raises:
        ConfigError: there is none; the message names the nearest.
    """
    if name not in STUDIES:
        near = difflib.get_close_matches(name, STUDIES, 1, 0.0)
        raise ConfigError(f"unknown study {name!r}; did you mean {near[0]!r}? `cbam study` lists them")
    return STUDIES[name]


def find_images(dataset: str, changes: dict[str, Any], names: Sequence[str] = ()) -> Pictures | BoxedPictures:
    """The images of "digits", or of a folder, which several studies can share.

    Args:
        names: the studies; those that train detectors need images with boxes.

    Raises:
        ConfigError, DataError: no such data set, a size for the digits, or studies that need different data.
    """
    boxed = [name for name in names if find_study(name).boxed]
    if boxed and len(boxed) < len(names):
        raise ConfigError(
            f"images with boxes are needed for {', '.join(boxed)}: run these in a separate call"
        )
    if boxed:
        if dataset == DIGITS:
            raise ConfigError(f"study {boxed[0]} needs --dataset, a folder of COCO or Pascal VOC")
        pictures = BoxedPictures(dataset, size=changes.get("size"), limit=changes.get("limit"))
        if other := [name for name in boxed if find_study(name).rules not in (None, pictures.rules)]:
            raise ConfigError(
                f"study {other[0]} uses Pascal VOC's metric, but {pictures.name} is in COCO's format"
            )
        return pictures
    if dataset != DIGITS:
        return Pictures(dataset, size=changes.get("size"), limit=changes.get("limit"))
    if changes.get("size"):
        raise ConfigError("size applies to image folders only, and the data set is digits")
    return Pictures(limit=changes.get("limit"))


def prepare(
    name: str,
    pictures: Pictures | BoxedPictures,
    changes: dict[str, Any],
    *,
    out: str,
    device: str = "auto",
    workers: int = 0,
    arms: list[str] | None = None,
    commit: str | None = None,
    watch: Watch | None = None,
) -> Filling:
    """Prepare a study; nothing is written yet.

    Args:
        changes: settings of `Protocol` that replace the usual ones.
        out: the folder with a subfolder per study.

    Raises:
        ConfigError, DataError: names, settings or images that do not go together.
    """
    study, where = find_study(name), pick_device(device)
    if study.many_networks and changes.get("network"):
        raise ConfigError(f"study {name} has its own networks: omit --network, or select rows with --arms")
    if "+" in (changes.get("network") or ""):
        raise ConfigError(
            f"network must be the plain network, got {changes['network']!r}; the rows attach the attention"
        )
    if changes.get("regions") and not study.boxed:
        raise ConfigError(f"regions apply to detectors only, and study {name} has none")
    if isinstance(pictures, Pictures) and pictures.folder:
        check_output_folder(pictures.folder, Path(out))
    own = changes | {"size": pictures.size}
    if own.get("warmup_epochs") == 0:
        own["warmup_epochs"] = None  # as in records without a warm-up
    training = Training(
        dataclasses.replace(study.usual(pictures.name, pictures.all, pictures.about["size"]), **own),
        pictures,
        where,
        workers=workers,
    )
    return Filling(study, Records(out, name), training, arms=arms, commit=commit, watch=watch)


def conduct(filling: Filling, *, seeds: int = SEEDS, budget: float | None = None, share: float = 1.0) -> int:
    """Train the runs without a record, then rewrite the tables, even if training is interrupted.

    Returns:
        The number of runs that still have no record.
    """
    try:
        left = filling.fill(seeds, budget=budget, share=share)
    except BaseException:
        with contextlib.suppress(Exception):  # the first error is the one to raise
            write_tables(filling.records, filling.study)
        raise
    write_tables(filling.records, filling.study)
    return left


def write_tables(records: Records, study: Study) -> list[Path]:
    """Compute every table and figure of a study from its records."""

    def make(found: list[dict[str, Any]]) -> dict[str, str]:
        files = {}
        for table in tables(study, found):
            drawn = figure(table)
            files[f"{table.name}.md"] = markdown(table, f"{table.name}.svg" if drawn else None)
            if drawn:
                files[f"{table.name}.svg"] = drawn
        return files

    return records.compute(make) if records.all() else []


def as_text(records: Records, study: Study) -> str:
    """Every table of a study as plain text."""
    return "\n".join(text(table) for table in tables(study, records.all().values()))
