"""What surrounds a graph at work: images in, detections out, servers. No PyTorch."""
