"""How fast blobpipe is, each figure against something timed in the same run: ``python -m benchmarks``."""
