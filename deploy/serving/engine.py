"""The engines that run graphs, and what a graph opened in one of them can do."""

import argparse
from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Dict, List, Optional

import numpy as np

ENGINES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}  # by the packages they are
EXTRAS = {"onnxruntime": "deploy", "openvino": "openvino"}  # of setup.cfg


@dataclass(frozen=True)
class Engine:
    """A key of `ENGINES` and its version."""

    name: str
    version: str

    def __str__(self) -> str:
        return f"{ENGINES[self.name]} {self.version}"


class Session(ABC):
    """A graph opened in an engine. Any number of threads may run it at once.

    name: what to call the graph in messages; providers: what it runs on, best first;
    output_names: in the graph's order; carries_nan: whether NaN passes through every operator.
    """

    engine: Engine
    name: str
    providers: List[str]
    output_names: List[str]
    carries_nan: bool = True

    @abstractmethod
    def run(self, feed: Dict[str, np.ndarray]) -> Dict[str, np.ndarray]:
        """The outputs by name.

        Raises:
            UserError: it did not end within the `time_limit`, after which it is ended between two
                nodes; or the graph cannot run on what it was fed.
        """


def installed() -> List[str]:
    """Engines that are there, ONNX Runtime first."""
    return [name for name in ENGINES if find_spec(name)]


def add_engines(parser: argparse.ArgumentParser) -> None:
    """--engine of what verifies: again for more, by default all that are installed."""
    text = "run the gates in this one only; again for more (default: each that is installed)"
    add_option(parser, text, action="append", default=[])


def add_option(parser: argparse.ArgumentParser, text: Optional[str] = None, **options) -> None:
    """--engine; by default one of them, ONNX Runtime."""
    options = options or {"default": "onnxruntime"}
    text = text or "what runs the graph (%(default)s)"
    parser.add_argument("--engine", choices=list(ENGINES), help=text, **options)
