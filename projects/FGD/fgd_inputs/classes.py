"""Classes of a model and of a dataset, matched by name."""

from typing import List, Sequence

from .errors import UserError
from .json_file import shown


def class_positions(model: Sequence[str], dataset: Sequence[str], name: str) -> List[int]:
    """Where each class of a model stands among those of a dataset, in the model's order.

    Args:
        name: of the dataset, for messages.
    Raises:
        UserError: the names differ. AP over some of the classes would look like a bad model.
    """
    missing, unknown = sorted(set(model) - set(dataset)), sorted(set(dataset) - set(model))
    if missing or unknown or not len(set(model)) == len(model) == len(dataset):
        raise UserError(
            f"classes of the model and of {name} differ: only in the model {shown(missing)}, only "
            f"in the dataset {shown(unknown)}, {len(model)} in the model, {len(dataset)} in the "
            "dataset"
        )
    positions = {own: i for i, own in enumerate(dataset)}
    return [positions[own] for own in model]
