"""Command: exported graph -> model repository of NVIDIA Triton, which appears whole or not at all.

Needs what the runtime needs; Triton itself is not needed.
"""

import argparse
import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, List, Optional, Sequence

from deploy.errors import UserError, run_main
from deploy.files import make_folder, write_atomically
from deploy.serving.triton_model import (
    DEFAULT_BATCH,
    KINDS,
    LABELS,
    ServedModel,
    fits,
    served_model,
)

_EXAMPLES = """examples:
  python deploy/triton_repository.py model_final_onnx/model.onnx repository --name shapes
  python deploy/triton_repository.py model.onnx repository --version 2 --max-batch-size 16

Writes REPOSITORY/NAME/ with config.pbtxt, labels.txt and VERSION/model.onnx, for
  tritonserver --model-repository REPOSITORY
The pixels' path from an image file to the graph and back is deploy/client.py's.
"""


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
    kept = fits(target, served)
    if (target / str(version)).exists() and not force:
        raise UserError(f"{target} has version {version}; use another --version, or --force")
    if target.exists() and not kept and (others or not force):
        raise UserError(
            f"{target} has other inputs, outputs, classes or resizing than this graph"
            + (f", and versions {others} rely on them" if others else "")
            + "; use another --name"
            + ("" if others else ", or --force to replace it")
        )
    make_folder(repository)
    try:
        with _scratch(Path(repository), name) as scratch:
            if not target.exists() or not kept:
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
        prog="triton_repository.py",
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
        help=f"most images per run; default {DEFAULT_BATCH}, or 0 for a graph with batch 1 fixed",
    )
    parser.add_argument("--instances", type=int, default=1, help="per device (%(default)s)")
    parser.add_argument("--device", choices=sorted(KINDS), default="auto")
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


if __name__ == "__main__":
    raise SystemExit(main())
