"""float16 and int8 graphs: made, calibrated, gated."""
