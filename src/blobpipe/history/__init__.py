"""What changes from image to image: deep differences, histories of depth, landing dates.

Imports all rooms before it: core to detection.
Stages: none.
"""
