"""What an exported file holds: every initializer is accounted for, so nothing else can be in it."""

from dataclasses import asdict, dataclass, field
from typing import Dict, List

import numpy as np
import onnx
from onnx import numpy_helper
from torch import Tensor, nn

_PREFIX = "student."  # of the student's tensors, from `ExportableDetector.student`
FOLDED_BIAS = "_bias"  # what the exporter appends to a convolution's weight when it folds
# Of a constant with fractions that differ. Numbers of classes and positions are whole.
_LARGEST_CONSTANT = 64


@dataclass
class Inventory:
    """Counts of values (elements), not of tensors.

    student = kept + folded + redundant + unused; file = kept + biases + constants.
    """

    student: int = 0  # parameters and buffers of the model
    kept: int = 0  # of them, in the file under their own name
    folded: int = 0  # batch norms that went into the convolution before them
    redundant: int = 0  # zero biases, and tensors equal to one that is kept
    unused: int = 0  # not reached by inference
    biases: int = 0  # of convolutions that a batch norm was folded into
    constants: int = 0  # thresholds, shapes, class and level numbers
    unused_names: List[str] = field(default_factory=list)
    foreign_names: List[str] = field(default_factory=list)  # in the file, and nobody's

    def text(self) -> str:
        """One line."""
        return (
            f"student {self.student:,} values = {self.kept:,} kept + {self.folded:,} batch norm "
            f"folded + {self.redundant:,} zero or duplicate + {self.unused:,} unused; file = kept "
            f"+ {self.biases:,} biases from folding + {self.constants:,} constants"
        )

    def to_dict(self) -> Dict:
        """For report.json."""
        return asdict(self)


def take_inventory(student: nn.Module, model: onnx.ModelProto) -> Inventory:
    """Account for every tensor of the exported copy of the student and every initializer."""
    tensors = {**dict(student.named_parameters()), **dict(student.named_buffers())}
    norms = {name for name, part in student.named_modules() if hasattr(part, "running_var")}
    in_file = {tensor.name: tensor for tensor in model.graph.initializer}
    kept = {name for name in tensors if _PREFIX + name in in_file}
    contents = {_content(tensors[name]) for name in kept}
    found = Inventory(student=sum(tensor.numel() for tensor in tensors.values()))
    for name, tensor in tensors.items():
        if name in kept:
            found.kept += tensor.numel()
        elif name.rpartition(".")[0] in norms:
            found.folded += tensor.numel()
        elif not tensor.any() or _content(tensor) in contents:
            found.redundant += tensor.numel()
        else:
            found.unused += tensor.numel()
            found.unused_names.append(name)
    for name, tensor in in_file.items():
        if name.removeprefix(_PREFIX) in kept:
            continue
        values = int(np.prod(tensor.dims))
        if name.endswith(FOLDED_BIAS) and name.removesuffix(FOLDED_BIAS) in in_file:
            found.biases += values
            continue
        found.constants += values
        if values > _LARGEST_CONSTANT and _may_be_trained(numpy_helper.to_array(tensor)):
            found.foreign_names.append(name)
    return found


def _may_be_trained(array: np.ndarray) -> bool:
    """Whether these are fractions that differ; what is whole counts, places or chooses."""
    if array.dtype.kind in "biu":
        return False
    return bool(np.ptp(array) and (array != np.round(array)).any())


def _content(tensor: Tensor) -> bytes:
    array = tensor.detach().cpu().numpy()
    return str((array.dtype, array.shape)).encode() + array.tobytes()
