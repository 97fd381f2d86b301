"""False alarms of a finished run on further simulated images without a new blob.

    cp experiments/roman.yaml params.yaml && snakemake --cores 2
    python -m tests.quiet_alarms --images 40

A short run has few images to count on: with `experiments/roman.yaml`, two historical ones, and ten on which the threshold
rests. Here the model of `results/detect` searches more at its own threshold: those that follow the ten, which neither training
nor the threshold has seen. Each is simulated, subtracted and searched; nothing is written. Run it in the folder of the run.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd

from blobpipe.cli.paths import OWN_MODEL
from blobpipe.core.detector import read_detector
from blobpipe.core.metrics import wilson_interval
from blobpipe.detection.detectors import load_dense_detector
from blobpipe.detection.search import observe, read_pipeline_template
from blobpipe.images.difference import subtract
from blobpipe.params import Params, load_params
from blobpipe.simulation import campaign

DIFFERENCE = "data/difference"


def main() -> None:
    """Count, and print a line for each alarm and one for all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2, help="images at a time, 1.5 GiB each")
    args = parser.parse_args()
    params = load_params("params.yaml")
    start, start_cpu = time.monotonic(), time.process_time()
    alarms = count_alarms(params, args.images, args.threads)
    for row in alarms.itertuples():
        print(f"image {row.number}: x {row.x_px:.1f}, y {row.y_px:.1f}, S/N {row.snr:.1f}")
    n_with = alarms["number"].nunique()
    low, high = (float(end) for end in wilson_interval(np.array(n_with), np.array(args.images)))
    print(
        f"{params.detector}: {len(alarms)} false alarms; {n_with} of {args.images} images have one "
        f"({low:.2f} to {high:.2f}, 95 %); budget {params.detect.false_alarms_per_100_frames / 100:g} per image"
    )
    print(f"{time.monotonic() - start:.0f} s, {time.process_time() - start_cpu:.0f} s of CPU")


def count_alarms(params: Params, n_images: int, n_threads: int) -> pd.DataFrame:
    """Search further quiet images of a run's campaign, and return what its model calls a new blob.

    Parameters
    ----------
    params : Params
        Settings of the run.
    n_images : int
    n_threads : int

    Returns
    -------
    DataFrame
        number, x_px, y_px, snr, score of each false alarm.
    """
    detector = load_dense_detector(OWN_MODEL)
    template = read_pipeline_template(DIFFERENCE)
    instrument = read_detector(params.detector)
    known = pd.DataFrame(campaign.known_blobs(params.campaign, instrument))

    # As `detection.quiet.search_quiet_images`, which gives scores and no threshold
    def search(number: int) -> pd.DataFrame:
        image = campaign.render_quiet_image(params.campaign, number, instrument)
        difference, shift = subtract(image, template, params.difference, instrument)
        observation = observe(
            difference, template, catalogue=known, shift_px=shift, instrument=instrument
        )
        peaks = detector.search(observation.scaled(params.clip, params.scale))
        found = observation.find_blobs(detector, peaks=peaks, vetting=params.vetting)
        is_alarm = (found["status"] == "new") & (found["score"] >= detector.threshold)
        return found.loc[is_alarm, ["x_px", "y_px", "snr", "score"]].assign(number=number)

    numbers = range(params.detect.n_quiet, params.detect.n_quiet + n_images)
    with ThreadPoolExecutor(n_threads) as pool:
        return pd.concat(list(pool.map(search, numbers)), ignore_index=True)


if __name__ == "__main__":
    main()
