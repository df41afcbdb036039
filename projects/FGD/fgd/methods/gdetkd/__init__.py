"""G-DetKD: RoI features of all levels, and each region's embedding against those of others."""

from .method import GDetKD

__all__ = ["GDetKD"]
