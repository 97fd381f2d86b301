# Shared by all rules: the validated settings, the images and their batches, and the stages of dvc.yaml.
import math
import os
import sys

from snakemake.exceptions import WorkflowError

sys.dont_write_bytecode = True  # a dry run must leave no files behind
sys.path[:0] = [f"{workflow.basedir}/src", f"{workflow.basedir}/workflow/scripts"]

from blobpipe.core import fits_images, tables
from blobpipe.errors import BlobpipeError
from blobpipe.params import load_params, read_yaml
from blobpipe.simulation import campaign
from environment import use_project
from stages import settings, settings_of, stages

use_project(workflow.basedir)

# Work on one core (s): of an image of 1024 x 1024, and of a subframe in one epoch; measured on an AMD EPYC (family 25)
WORK_S = {
    "campaign": 0.11,
    "difference": 0.44,
    "clip": 0.07,
    "scale": 0.04,
    "detect": 0.13,
    "regression": 0.07,
    "deep": 1.0,
    "quicklook": 3.1,
    "train": 1 / 310,
    "dense": 1 / 350,
}

# Time that a job may take: a multiple of its work, for slower machines, and this besides (min)
RESERVE = 4
START_MIN = 15


def minutes(stage, n):
    """Return the time limit of a job that works on so many images or subframes (min)."""
    return START_MIN + math.ceil(RESERVE * WORK_S[stage] * n / 60)


def cores(threads):
    """Return the cores of a job of so many threads here; on SLURM it asks for as many (`cpus_per_task`).

    Such a job leaves some of them idle much of the time, so on a machine of two cores two of them run in parallel.
    """
    return 1 if workflow.cores == 2 else threads


def n_searched():
    """Return the subframes that all trials show to their networks, the most that there may be (count)."""
    epochs = PARAMS.search.space.get("epochs", (PARAMS.train.epochs,))
    most = max(epochs) if isinstance(epochs, tuple) else int(epochs.high)
    return PARAMS.search.n_trials * PARAMS.search.n_seeds * PARAMS.search.n_train * most


def checked_params():
    """Read params.yaml. The stages read it themselves, so Snakemake must not be given other settings."""
    if config:
        raise WorkflowError(
            "settings come from params.yaml alone, as DVC reads them: change the file instead of --config or --configfile"
        )
    params = load_params("params.yaml")
    if not os.path.exists(f"{workflow.basedir}/src/blobpipe/detectors/{params.detector}.yaml"):
        raise WorkflowError(
            f"params.yaml: detector: found {params.detector}, expected the name of a file in src/blobpipe/detectors, where DVC "
            "sees its changes; copy the detector's file there and name it without .yaml"
        )
    config.update(read_yaml("params.yaml"))  # for the captions of the report
    return params


def image_list():
    """Return the rows of the list of images, with all its columns for the user's own images."""
    if "campaign" in stages():
        return [{"frame": name} for name in campaign.frame_names(PARAMS.campaign)]
    return tables.read_frame_list("data/raw").astype(str).to_dict("records")


def images(rows):
    """Return the files of some rows of the list."""
    if "campaign" in stages():
        return [f"data/raw/{row['frame']}.fits.fz" for row in rows]
    return [str(fits_images.find_image("data/raw", row["frame"])) for row in rows]


def up_to(batch):
    """Return the rows of a batch, preceded by those that its running stacks may use."""
    rows = BATCHES[int(batch)]
    return ROWS[max(0, rows.start - REACH) : rows.stop]


def each_batch(pattern):
    """Return one path per batch."""
    return [pattern.format(batch=f"{number:03d}") for number in range(len(BATCHES))]


def batch_before(pattern, batch):
    """Return the path of the batch before one; an empty list for the first."""
    return each_batch(pattern)[: int(batch)][-1:]


try:
    stages()
    PARAMS = checked_params()
    ROWS = image_list()
    RAW_IMAGES = images(ROWS)
except BlobpipeError as error:
    raise WorkflowError(str(error))

BATCHES = tables.batches(len(ROWS))
BATCH = tables.batch_size(len(ROWS))
REACH = 2 * PARAMS.difference.stack_size  # a stack reaches further back if images were rejected
CATALOGUE = ["data/raw/blobs.csv"] if "campaign" in stages() or os.path.exists("data/raw/blobs.csv") else []
