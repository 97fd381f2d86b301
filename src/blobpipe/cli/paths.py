"""Where stages and commands keep their files, relative to the working folder."""

from __future__ import annotations

# Folders of the stages
RAW = "data/raw"
DIFFERENCE = "data/difference"
CLIP = "data/clip"
SCALE = "data/scale"
CUTOUT = "results/cutout"
AUGMENT = "results/augment"
TRAIN = "results/train"
EVALUATE = "results/evaluate"
REGRESSION = "results/regression"
DENSE = "results/dense"
DETECT = "results/detect"
COMPLETENESS = "results/completeness"
DEEP = "results/deep"
EXPLORE = "results/explore"
SEARCH = "results/search"

# The report's network; the dense network as trained; the same with its operating point
MODEL = f"{TRAIN}/model.safetensors"
DENSE_MODEL = f"{DENSE}/model.safetensors"
OWN_MODEL = f"{DETECT}/model.safetensors"

# Metrics of the regression test, which the gate reads
REGRESSION_METRICS = f"{REGRESSION}/metrics.json"
STAGES_PAGE = "stages.html"  # Snakemake's own report, beside ours
PARAMS = "params.yaml"
PIPELINE = "dvc.yaml"
LOCK = "dvc.lock"  # DVC's record of each stage: its settings, and the checksums of its files
LOG = "quicklook/log.sqlite"
