"""FGD: masks, attention, the terms by their definition, and the same in less memory and time."""

from .method import FGD

__all__ = ["FGD"]
