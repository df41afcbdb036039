"""What training and deployment share, without PyTorch.

What comes in from outside, read by one rule; names from outside, written by one rule; the lock of
a folder. COCO JSONs need the standard library only, image files Pillow and numpy.
"""
