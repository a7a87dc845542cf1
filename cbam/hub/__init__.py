"""Trained networks as folders to share: weights, configuration and a model card."""

from cbam.hub.card import Card
from cbam.hub.folder import card_of, from_pretrained, is_published, save_pretrained

__all__ = ["Card", "card_of", "from_pretrained", "is_published", "save_pretrained"]
