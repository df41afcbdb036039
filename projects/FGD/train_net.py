#!/usr/bin/env python
"""Train, resume or evaluate a detector, with or without distillation; ``--help`` shows examples."""

from fgd.cli import main
from fgd.processes.launch import leave

if __name__ == "__main__":
    leave(main())
