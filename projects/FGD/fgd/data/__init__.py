"""Datasets by config keys: COCO-format files, generated shapes, and checks of both."""
