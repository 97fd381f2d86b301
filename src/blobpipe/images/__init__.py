"""An exposure becomes a blob image, a difference from a template, and a clipped and scaled image.

Imports core and noise.
Stages: difference, clip, scale.
"""
