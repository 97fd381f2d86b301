# From monitor images to a regression report, in the order in which an image meets the stages. A stage has one name: that
# of its rules file, its section of params.yaml, its entry in dvc.yaml (what it reads and makes) and `blobpipe STAGE`.
from snakemake.utils import min_version

min_version("9.17")


include: "workflow/rules/common.smk"


wildcard_constraints:
    batch=r"\d+",


# What each stage makes; its rules file fills this in. Inputs are plain paths, here and there: where one is written as
# rules.X.output, Snakemake runs rule X too, whatever --allowed-rules says.
STAGE_FILES = {}


if "campaign" in stages():  # not where `dvc remove campaign` made room for images of the user's own

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
include: "workflow/rules/explore.smk"
include: "workflow/rules/quicklook.smk"


rule all:
    default_target: True
    input:
        [path for paths in STAGE_FILES.values() for path in paths],
        STAMPS,
