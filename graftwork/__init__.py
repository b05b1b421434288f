"""Graftwork grafts pretrained networks onto your data."""

__version__ = "0.1.0"
