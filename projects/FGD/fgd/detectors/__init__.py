"""Detectors and backbones that Detectron2 does not have, or not by config."""
