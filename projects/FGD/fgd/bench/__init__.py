"""What distillation costs: ``python -m fgd.bench loss`` and ``python -m fgd.bench step``."""
