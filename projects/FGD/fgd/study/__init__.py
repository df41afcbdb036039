"""Does distillation pay? Arms × seeds of the same student: ``python -m fgd.study``."""
