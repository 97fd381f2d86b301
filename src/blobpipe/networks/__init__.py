"""The report's network and the dense network, their training and their kernels.

Imports core, images and simulation.
Stages: train, dense.
"""
