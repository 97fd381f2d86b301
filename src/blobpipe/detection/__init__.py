"""One difference image becomes a list of blobs: search, fit, vetting, score, threshold.

Imports core, noise, images, simulation and networks.
Stages: detect.
"""
