"""The studies: one file per table, each with its named rows."""

from cbam.studies.study import Study
from cbam.studies.tables import (
    channel,
    coco,
    mobile,
    networks,
    order,
    peers,
    placement,
    reduction,
    spatial,
    start,
    voc,
)

__all__ = ["STUDIES"]

_FILES = (channel, spatial, order, networks, mobile, peers, reduction, start, placement, coco, voc)
STUDIES: dict[str, Study] = {file.STUDY.name: file.STUDY for file in _FILES}
