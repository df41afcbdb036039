"""What of a graph is made otherwise for TensorRT, and what builds an engine of it."""
