"""DRKD: relations between pixels, between instances, and the instances' features."""

from .method import DRKD

__all__ = ["DRKD"]
