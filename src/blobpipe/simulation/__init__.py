"""Images and training subframes that are made up: campaigns, stamps, clutter, rendering.

Imports core and images.
Stages: campaign, cutout, augment.
"""
