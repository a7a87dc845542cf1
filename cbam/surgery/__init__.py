"""Attach attention to a model and detach it, list where it can go, and load weights of every dialect."""

from cbam.surgery.attach import attach, bypassed, detach
from cbam.surgery.convert import convert_state_dict
from cbam.surgery.sites import Site, attached, sites
from cbam.surgery.weights import load_weights

__all__ = [
    "Site",
    "attach",
    "attached",
    "bypassed",
    "convert_state_dict",
    "detach",
    "load_weights",
    "sites",
]
