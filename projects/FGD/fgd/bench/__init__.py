"""What distillation costs: ``python -m fgd.bench loss``, ``step`` and ``gpu``."""
