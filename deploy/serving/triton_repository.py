"""What `python deploy/triton.py` does: a model folder as NVIDIA Triton Inference Server reads it.

Needs what the runtime needs; Triton itself is not needed.
"""

import argparse
import json
import os
import re
import shutil
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Iterator, List, Optional, Sequence

from deploy.errors import UserError, run_main
from deploy.files import make_folder, write_atomically
from deploy.runtime import OrtDetector
from deploy.serving.graph_file import read_graph_file
from deploy.spec import ModelSpec

_EXAMPLES = """examples:
  python deploy/triton.py model_final_onnx/model.onnx repository --name shapes
  python deploy/triton.py model.onnx repository --name shapes --version 2 --max-batch-size 16

Writes REPOSITORY/NAME/ with config.pbtxt, labels.txt and VERSION/model.onnx, for
  tritonserver --model-repository REPOSITORY
The pixels' path from an image file to the graph and back is deploy/client.py's.
"""
SPEC_PARAMETER = "spec"  # of config.pbtxt: the ModelSpec's metadata, for clients
LABELS = "labels.txt"
_DEFAULT_BATCH = 8
# what all versions of a model have in common, because clients prepare images by it
_SHARED = (
    "classes",
    "input_format",
    "min_size",
    "max_size",
    "size_divisibility",
    "dynamic",
    "filled",
)
_TYPES = {"float32": "TYPE_FP32", "uint8": "TYPE_UINT8", "int32": "TYPE_INT32"}
_KINDS = {"auto": "KIND_AUTO", "cpu": "KIND_CPU", "gpu": "KIND_GPU"}


@dataclass
class ServedModel:
    """The files of one model.

    spec: of the graph;  tensors: the part of config.pbtxt that says what goes in and out;
    config: all of it;  labels: a class name per line;  graph: the file.
    """

    spec: ModelSpec
    tensors: str
    config: str
    labels: str
    graph: bytes


def served_model(
    model, name: str, max_batch_size: Optional[int] = None, instances: int = 1, device: str = "auto"
) -> ServedModel:
    """The files for a graph, checked against the graph itself.

    Args:
        model: .onnx file written by deploy/export.py.  name: of the model in Triton.
        max_batch_size: most images per run; None: 8, or 0 if the graph has batch 1 fixed.
        instances: copies that run at once, per device.  device: "auto", "cpu" or "gpu".
    Raises:
        UserError: no graph of ours, or its tensors are not those it describes; a name, number or
            class name that Triton cannot use; a batch size that the graph cannot run.
    """
    if not re.fullmatch(r"\w[\w.-]*", name, re.ASCII):
        raise UserError(f"model name {name!r}: use letters, digits, '_', '-' and '.'")
    if instances < 1:
        raise UserError(f"--instances is {instances}, expected 1 or more")
    detector = OrtDetector(model)  # compares every tensor's name, type and shape with the spec
    spec = detector.spec
    if any(len(label.splitlines()) != 1 for label in spec.classes):
        raise UserError(f"a class name is empty or has a line break: {spec.classes}")
    batch = _batch_size(spec, max_batch_size, model)
    tensors = _tensors(spec)
    return ServedModel(
        spec=spec,
        tensors=tensors,
        config=_service(name, batch, instances, device) + tensors + _spec_line(spec),
        labels="".join(f"{label}\n" for label in spec.classes),
        graph=read_graph_file(detector.path),
    )


def _batch_size(spec: ModelSpec, wanted: Optional[int], model) -> int:
    fixed = spec.dynamic == "none"
    if wanted is None:
        return 0 if fixed else _DEFAULT_BATCH
    if fixed and wanted != 0:
        raise UserError(
            f"--max-batch-size {wanted}: {model} was exported with batch 1 fixed; leave the option "
            "out, or export with --dynamic batch"
        )
    if not fixed and wanted < 1:
        raise UserError(f"--max-batch-size is {wanted}, expected 1 or more for {model}")
    return wanted


def _tensors(spec: ModelSpec) -> str:
    """Inputs and outputs. Without the batch dimension where Triton batches, which is where the
    graph leaves it open."""
    contract, blocks = spec.contract(), []
    for kind in ("input", "output"):
        tensors = []
        for name, tensor in contract[f"{kind}s"].items():
            shape = tensor["shape"] if spec.dynamic == "none" else tensor["shape"][1:]
            dims = ", ".join(str(side) if isinstance(side, int) else "-1" for side in shape)
            label = f' label_filename: "{LABELS}"' if name == "labels" else ""
            dtype = _TYPES[tensor["dtype"]]
            tensors.append(f'  {{ name: "{name}" data_type: {dtype} dims: [ {dims} ]{label} }}')
        blocks.append(f"{kind} [\n" + ",\n".join(tensors) + "\n]\n")
    return "".join(blocks)


def _spec_line(spec: ModelSpec) -> str:
    """For clients. Without hashes and versions, which are a version's own."""
    metadata = json.dumps(replace(spec, hashes={}, versions={}).to_metadata())
    # json.dumps once more: of ASCII it makes what is a string in protobuf's text format, too
    value = f"value: {{ string_value: {json.dumps(metadata)} }}"
    return f'parameters: {{ key: "{SPEC_PARAMETER}" {value} }}\n'


def _served_spec(config: str) -> Optional[ModelSpec]:
    """What `_spec_line` put into a config.pbtxt; None if there is none or it cannot be read."""
    line = re.search(
        rf'key: "{SPEC_PARAMETER}" value: {{ string_value: (".*") }} }}$', config, re.M
    )
    try:
        return ModelSpec.from_metadata(json.loads(json.loads(line[1])))
    except (TypeError, ValueError):
        return None


def _service(name: str, max_batch_size: int, instances: int, device: str) -> str:
    lines = [
        f'name: "{name}"',
        'backend: "onnxruntime"',
        f"max_batch_size: {max_batch_size}",
        f"instance_group [ {{ count: {instances} kind: {_KINDS[device]} }} ]",
    ]
    if max_batch_size > 1:
        lines.append("dynamic_batching { }")
    return "\n".join(lines) + "\n"


def publish(served: ServedModel, repository, name: str, version: int, force: bool = False) -> bool:
    """Write REPOSITORY/NAME; a server that looks meanwhile sees no half-written model or version.

    A new version of a model that is there keeps its config.pbtxt, which may have been tuned.

    Returns:
        Whether config.pbtxt was written, too.
    Raises:
        UserError: the version is there and `force` is not given; the model's other versions have
            other inputs, outputs, classes or resizing; the folder cannot be written.
    """
    if version < 1:
        raise UserError(f"--version is {version}, expected 1 or more")
    target = Path(repository) / name
    others = [found for found in _versions(target) if found != version]
    fits = _fits(target, served)
    if (target / str(version)).exists() and not force:
        raise UserError(f"{target} has version {version}; use another --version, or --force")
    if target.exists() and not fits and (others or not force):
        raise UserError(
            f"{target} has other inputs, outputs, classes or resizing than this graph"
            + (f", and versions {others} rely on them" if others else "")
            + "; use another --name"
            + ("" if others else ", or --force to replace it")
        )
    make_folder(repository)
    try:
        with _scratch(Path(repository), name) as scratch:
            if not target.exists() or not fits:
                _write_model(scratch / "new", served, version)
                if target.exists():
                    os.rename(target, scratch / "old")
                os.rename(scratch / "new", target)
                return True
            _write_version(scratch / "new", served, version, target)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from error
    if force:
        write_atomically(target / "config.pbtxt", served.config.encode())
    return force


def _versions(target: Path) -> List[int]:
    folders = target.iterdir() if target.is_dir() else ()
    return sorted(int(path.name) for path in folders if path.name.isdecimal())


def _fits(target: Path, served: ServedModel) -> bool:
    """Whether clients of the model at `target` would notice nothing but better detections."""
    try:
        config = (target / "config.pbtxt").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    spec = _served_spec(config)
    return (
        spec is not None
        and served.tensors in config
        and all(getattr(spec, name) == getattr(served.spec, name) for name in _SHARED)
    )


@contextmanager
def _scratch(repository: Path, name: str) -> Iterator[Path]:
    """A folder on the repository's own disk, in which Triton finds neither config nor version."""
    scratch = repository / f".{name}.{os.getpid()}.tmp"
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write_model(folder: Path, served: ServedModel, version: int) -> None:
    write_atomically(folder / str(version) / "model.onnx", served.graph)
    write_atomically(folder / LABELS, served.labels.encode())
    write_atomically(folder / "config.pbtxt", served.config.encode())


def _write_version(scratch: Path, served: ServedModel, version: int, target: Path) -> None:
    """A version folder appears whole; in one that is there, the graph is replaced."""
    write_atomically(scratch / "model.onnx", served.graph)
    folder = target / str(version)
    if folder.exists():
        os.replace(scratch / "model.onnx", folder / "model.onnx")
    else:
        os.rename(scratch, folder)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="triton.py",
        description="Write an exported model into an NVIDIA Triton model repository.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help=".onnx file written by deploy/export.py")
    parser.add_argument("repository", help="folder of models; made if it is not there")
    parser.add_argument("--name", default="detector", help="of the model (%(default)s)")
    parser.add_argument("--version", type=int, default=1, help="of the model (%(default)s)")
    parser.add_argument(
        "--max-batch-size",
        type=int,
        metavar="N",
        help=f"most images per run; default {_DEFAULT_BATCH}, or 0 for a graph with batch 1 fixed",
    )
    parser.add_argument("--instances", type=int, default=1, help="per device (%(default)s)")
    parser.add_argument("--device", choices=sorted(_KINDS), default="auto")
    parser.add_argument("--force", action="store_true", help="replace a version that is there")
    parser.add_argument("--debug", action="store_true", help="traceback on errors")
    return parser


def _main(argv: Optional[Sequence[str]]) -> int:
    args = build_parser().parse_args(argv)
    served = served_model(args.model, args.name, args.max_batch_size, args.instances, args.device)
    new_config = publish(served, args.repository, args.name, args.version, args.force)
    folder = Path(args.repository) / args.name
    print(f"{folder / str(args.version) / 'model.onnx'}: {len(served.graph)} bytes")
    print(f"{folder / 'config.pbtxt'}: {'written' if new_config else 'kept as it was'}")
    return 0


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Exit code: 0 done, 2 bad usage, model or repository."""
    return run_main(_main, argv)
