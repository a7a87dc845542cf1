"""Trained networks as folders that others can use: weights, what they are, and a model card."""

from cbam.hub.card import Card
from cbam.hub.folder import card_of, from_pretrained, is_published, save_pretrained

__all__ = ["Card", "card_of", "from_pretrained", "is_published", "save_pretrained"]
