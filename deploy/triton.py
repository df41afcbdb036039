"""Command: exported graph -> NVIDIA Triton model repository; see serving/triton_repository.py.

This file only starts it, because it bears the name of the `triton` package, a compiler that PyTorch
imports. `python deploy/export.py` puts this folder first on the path of imports, so that import
finds this file; it then steps aside for the package.
"""

import importlib
import sys
from pathlib import Path

if __name__ == "triton":
    _HERE = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != _HERE]
    del sys.modules["triton"]
    importlib.import_module("triton")  # what `import triton` returns is then in sys.modules

if __name__ == "__main__":
    from deploy.serving.triton_repository import main

    raise SystemExit(main())
