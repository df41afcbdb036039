"""Distillation methods, one file each; a file in this folder is found, nothing lists it."""

from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import iter_modules

from .batch import Batch, Level
from .method import METHOD_REGISTRY, Method, build_method

__all__ = ["METHOD_REGISTRY", "Batch", "Level", "Method", "build_method"]

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
# Methods of other installed packages: their entry points of this group name modules to import.
for _point in entry_points(group="fgd.methods"):
    _point.load()
