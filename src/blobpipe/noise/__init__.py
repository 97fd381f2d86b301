"""How the noise of images is correlated is measured, what outputs share is subtracted, and the rest whitened.

Imports core.
Stages: none of its own.
"""
