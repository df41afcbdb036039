"""What comes in from outside, read by one rule for training and deployment. Without PyTorch.

COCO JSONs need the standard library only, image files Pillow and numpy.
"""
