# From monitor images to a regression report, in the order in which an image passes through the stages. A stage has one name:
# its rules file, its section of params.yaml, its entry in dvc.yaml (inputs and outputs) and `blobpipe STAGE`.
from snakemake.utils import min_version

min_version("9.17")


include: "workflow/rules/common.smk"


wildcard_constraints:
    batch=r"\d+",


# Outputs of each stage, filled in by its rules file. Inputs are plain paths everywhere: for an input written as
# rules.X.output, Snakemake would run rule X whatever --allowed-rules says.
STAGE_FILES = {}


if "campaign" in stages():  # absent after `dvc remove campaign`, for the user's own images

    include: "workflow/rules/campaign.smk"


include: "workflow/rules/difference.smk"
include: "workflow/rules/clip.smk"
include: "workflow/rules/scale.smk"
include: "workflow/rules/cutout.smk"
include: "workflow/rules/augment.smk"
include: "workflow/rules/train.smk"
include: "workflow/rules/dense.smk"
include: "workflow/rules/detect.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/regression.smk"
include: "workflow/rules/completeness.smk"
include: "workflow/rules/dvc.smk"
include: "workflow/rules/deep.smk"
include: "workflow/rules/explore.smk"
include: "workflow/rules/search.smk"
include: "workflow/rules/quicklook.smk"


rule all:
    default_target: True
    input:
        [path for paths in STAGE_FILES.values() for path in paths],
        STAMPS,
