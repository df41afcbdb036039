"""The command lines that build a TensorRT engine from an exported graph. Nothing is run here."""

import shlex
from typing import Any, Dict, List

from deploy.spec import INPUT_NAMES, ModelSpec

OPTIMAL_BATCH, LARGEST_BATCH = 4, 8  # of an engine with a dynamic batch; the user may change them
NO_ENGINE = (
    "no engine was built here: TensorRT was not run. The graph has been verified in ONNX Runtime"
)


def build_commands(spec: ModelSpec, file: str) -> Dict[str, str]:
    """TensorRT's major version -> its trtexec line.

    The types in the graph are the engine's: version 10 must be told so, 11 knows nothing else and
    has no --fp16 or --int8. Shapes are given for a dynamic batch only; trtexec refuses them for a
    fixed one.

    Args:
        spec: of the file; its canvas is fixed.  file: path of the .onnx file.
    """
    engine = f"{file.removesuffix('.onnx')}.engine"
    common = [f"--onnx={shlex.quote(file)}", f"--saveEngine={shlex.quote(engine)}"]
    if spec.dynamic == "batch":
        for name, batch in (("min", 1), ("opt", OPTIMAL_BATCH), ("max", LARGEST_BATCH)):
            common.append(f"--{name}Shapes={_shapes(spec, batch)}")
    return {
        "10": " ".join(["trtexec", "--stronglyTyped", *common]),
        "11": " ".join(["trtexec", *common]),
    }


def _shapes(spec: ModelSpec, batch: int) -> str:
    images, sizes = INPUT_NAMES
    return f"{images}:{batch}x3x{spec.height}x{spec.width},{sizes}:{batch}x2"


def describe_build(spec: ModelSpec, file: str, notes: List[str]) -> Dict[str, Any]:
    """What report.json says about one file; `notes` are those of the lint."""
    return {
        "engine_built": False,
        "commands": build_commands(spec, file),
        "notes": [NO_ENGINE, *notes],
    }


def build_text(described: Dict[str, Any]) -> str:
    """The same for the terminal."""
    lines = [f"TensorRT {version}: {line}" for version, line in described["commands"].items()]
    return "\n".join([*lines, *(f"TensorRT: {note}" for note in described["notes"])])
