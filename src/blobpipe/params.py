"""Every setting of the pipeline: one frozen model per stage, read from ``params.yaml``.

The models are the single place where a setting's meaning, unit, bounds and source stand. The JSON
schema for editors (``workflow/schemas/params.schema.json``) and the reference in the documentation
are generated from them.
"""

from __future__ import annotations

import functools
import ipaddress
import json
import re
import stat
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from blobpipe.errors import ParamsError

MAX_BYTES = 1_000_000  # of a YAML file: params.yaml has 12,000, dvc.lock 40,000
MAX_DEPTH = 20  # levels of nesting: params.yaml has 3, dvc.lock 7
PLAIN = {
    f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map")
}
# what a merge that git could not settle leaves
CONFLICT = re.compile(r"^(<{7}|>{7})( |$)", re.MULTILINE)

Fraction = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Positive = Annotated[float, Field(gt=0)]
LogOdds = Annotated[float, Field(ge=-20, le=20)]
HOST_LABEL = r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"  # RFC 1123, and the _ of private names
LONGEST_HOST = 253  # characters; RFC 1035
MAILBOX = r"[\w!#$%&'*+/=?^`{|}~-]+(\.[\w!#$%&'*+/=?^`{|}~-]+)*"  # RFC 5321, without quotes
LONGEST_MAILBOX = 64  # characters; RFC 5321


def is_host_name(text: str) -> bool:
    """Whether text can name a server: an IP address, or labels of 1 to 63 characters, beyond ASCII as IDNA has them."""
    if re.fullmatch(r"[0-9a-fA-F:.]*:[0-9a-fA-F:.]*(%\w+)?|[0-9.]+", text):
        return _is_ip_address(text)
    try:
        name = text.encode("idna") if len(text) <= LONGEST_HOST else b""
    except UnicodeError:
        return False
    return (
        re.fullmatch(rf"{HOST_LABEL}(\.{HOST_LABEL})*\.?", name.decode("ascii"), re.IGNORECASE)
        is not None
    )


def _is_ip_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _host(text: str) -> str:
    if text and not is_host_name(text):
        raise ValueError(
            f"found {text!r}, expected the name of a server alone, such as mail.example.org"
        )
    return text


def _mail_address(text: str) -> str:
    mailbox, _, domain = text.rpartition("@")
    known = is_host_name(domain) or (
        domain[:1] + domain[-1:] == "[]" and _is_ip_address(domain[1:-1])
    )
    if text and not (
        known and len(mailbox) <= LONGEST_MAILBOX and re.fullmatch(MAILBOX, mailbox, re.ASCII)
    ):
        raise ValueError(
            f"found {text!r}, expected a mail address alone, such as blobs@example.org"
        )
    return text


Address = Annotated[  # one @, no blanks: fit for a mail's header
    str, Field(pattern=r"^[!-?A-~]+@[!-?A-~]+$"), AfterValidator(_mail_address)
]


def _ordered(limits: tuple[float, float]) -> tuple[float, float]:
    if limits[0] > limits[1]:
        raise ValueError(f"found {list(limits)}, expected the lower limit first")
    return limits


Range = Annotated[tuple[Positive, Positive], AfterValidator(_ordered)]

SUBFRAME_PX = 256  # side of what the report's network sees (px); ISR 3.3
N_CLASSES = 2  # its answers: no blob, blob
MAX_WEIGHTS = 6_000_000  # of a network: 24 MB on disk; the report's has 528,098
Width = Annotated[int, Field(ge=1, le=128)]
Depth = Annotated[int, Field(ge=1, le=5)]


class Section(BaseModel):
    """One section of ``params.yaml``: frozen, no unknown keys, no silent conversions."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Campaign(Section):
    """The simulated monitor campaign: the default source of images."""

    seed: Seed = Field(1, description="Seed of every random choice of the simulation.")
    n_frames: int = Field(
        220,
        ge=4,
        le=100_000,
        description="Number of blob images (count). About 220 give the report's number of cases.",
    )
    first_frames: int = Field(
        30,
        ge=2,
        description="Images before the first new blob lands (count); they fill the first stack."
        " ISR 2.",
    )
    n_cases: int = Field(
        110,
        ge=1,
        description="Images that are the first to show one or more new blobs (count). ISR 7: "
        "over 100.",
    )
    n_known: int = Field(
        110,
        ge=1,
        description="Blobs present before the first image (count). Not in the report; modelled "
        "on the 2018 catalogue.",
    )
    photons_e: Range = Field(
        (12_000.0, 30_000.0),
        description="Range of the airglow's photon level (electrons per pixel). Measured.",
    )
    fixed_pattern_frac: float = Field(
        0.005,
        ge=0,
        le=0.1,
        description="Pixel-to-pixel pattern common to all images (fraction of the light).",
    )
    flattening_noise_frac: float = Field(
        0.0066,
        ge=0,
        le=0.1,
        description="White noise left in each image by flattening (fraction of the light). Set "
        "so that a difference image has the measured noise of 0.0101.",
    )
    shift_px: float = Field(
        0.04,
        ge=0,
        le=1,
        description="Scale of the usual CSM shift, per axis (px). Usually below 0.1 px.",
    )
    large_shift_frac: Fraction = Field(
        0.12,
        description="Share of images whose CSM stopped at another angle, with shifts of up to "
        "large_shift_px. Not in the report.",
    )
    large_shift_px: float = Field(
        3.0, ge=0, le=5, description="Largest CSM shift (px). Shifts of 'a few pixels' occur."
    )


class BadPixels(Section):
    """Known bad pixels, which have no value from the first step on (not in the report)."""

    files: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        (),
        description="FITS files of bad pixels: masks (not 0: bad) or bad-pixel tables (BPIXTAB), "
        "relative to the working folder; none: no mask.",
    )
    dq_flags: int | None = Field(
        None,
        ge=0,
        lt=2**32,
        description="Sum of the DQ flags that make a pixel bad, in the image's own extension DQ and "
        "in tables; null: exposure.bad_dq of the detector's file.",
    )


class Difference(Section):
    """Registration, and subtraction of the running median stack (ISR 2)."""

    stack_size: int = Field(
        30,
        ge=3,
        le=200,
        description="Preceding images in the running median (count). ISR 2.",
    )
    register_shift: bool = Field(
        True,
        description="Measure the CSM shift of each image and move the stack's blob pattern by "
        "it. If false, dips remain, for study.",
    )
    known_blobs: bool = Field(
        True,
        description="Inside a blob that landed within the last stack, use only the images since"
        " it landed; otherwise it appears new until the median shows it. Needs "
        "blobs.csv. Not in the report.",
    )


class Clip(Section):
    """Clipping (ISR 3.1)."""

    factor: float = Field(
        0.5,
        gt=0,
        le=10,
        description="Multiple of the zscale limits beyond which values are clipped. ISR 3.1.",
    )
    zscale_points: int = Field(
        10_000,
        ge=100,
        le=1_000_000,
        description="Pixels that zscale samples (count). With ginga's default of 1000 the "
        "limits depend on the extremes of the sample and vary from 1.3 to 3 sigma; "
        "10000 give the measured 3. Not in the report.",
    )
    border_px: int = Field(
        5,
        ge=0,
        le=64,
        description="Reference pixels on each side, set to the median (px). Instrument.",
    )


class Scale(Section):
    """Scaling (ISR 3.2): (pixel - clipped mean) / standard deviation."""

    clip_sigma: float = Field(
        3.0, gt=0, le=20, description="Sigma clipping of the mean (sigma). ISR 3.2."
    )
    iterations: int = Field(3, ge=0, le=20, description="Rounds of sigma clipping (count).")


class Cutout(Section):
    """Subframes, and blobs superimposed on half of them (ISR 3.3)."""

    seed: Seed = Field(1, description="Seed of every random choice of the cutouts.")
    n_train: int = Field(
        16_000, ge=2, le=10_000_000, description="Training subframes (count). ISR 3.3."
    )
    n_validation: int = Field(
        4_000, ge=2, le=10_000_000, description="Validation subframes (count)."
    )
    blob_frac: Fraction = Field(
        0.5, description="Share of subframes with superimposed blobs. ISR 3.3: half."
    )
    max_blobs: int = Field(
        5, ge=1, le=100, description="Maximum number of blobs on a subframe (count). ISR 3.3: 1-5."
    )
    strength: Range = Field(
        (0.5, 1.5),
        description="Range of the factor on a stamp's amplitude. Not in the report, which "
        "varied strength by eye.",
    )
    amplitude: Literal["report", "physical"] = Field(
        "report",
        description="report: a stamp in sigma of the median stack goes unchanged into the "
        "scaled difference; physical: it is multiplied by the ratio of the two "
        "noises and keeps its light loss.",
    )
    stamps: Literal["stack", "profiles", "mix"] = Field(
        "mix",
        description="Source of stamps: real pixels of the median stack, the simulator's "
        "profiles, or both.",
    )
    n_profiles: int = Field(
        256,
        ge=1,
        le=100_000,
        description="Stamps drawn from the profiles (count), if they are used.",
    )
    left_frac: Fraction = Field(
        0.75,
        description="Left part of each image that training may use; the rest is for validation."
        " ISR 3.3.",
    )
    whole_frames_frac: Fraction = Field(
        0.15, description="Share of the images held out whole for validation. Not in the report."
    )
    max_frames: int = Field(
        100,
        ge=2,
        le=1000,
        description="Maximum number of images that subframes are cut from (count); limits the "
        "memory.",
    )
    dip_frac: Fraction = Field(
        0.1,
        description="Share of subframes, of both classes, on which known blobs leave dips of an"
        " unregistered shift.",
    )
    dip_px: Range = Field(
        (0.2, 3.0), description="Range of those shifts (px). Measured: up to a few pixels."
    )


class Augment(Section):
    """Noise, rotations and flips of training subframes (ISR 3.4)."""

    seed: Seed = Field(1, description="Seed of every random choice of the augmentation.")
    noise_sigma: float = Field(
        0.75, ge=0, le=10, description="Added white noise (sigma of the scaled image). ISR 3.4."
    )
    rotate: bool = Field(True, description="Rotate by 0, 90, 180 or 270 degrees. ISR 3.4.")
    flip: bool = Field(True, description="Flip left and right, at random. ISR 3.4.")
    copies: int = Field(
        4,
        ge=1,
        le=1000,
        description="Different augmentations of each training subframe (count); epoch e shows "
        "copy e mod copies.",
    )


class ReportShape(Section):
    """Shape of the report's network (ISR 4): blocks of convolution and pooling, then layers of neurons."""

    filters: tuple[Annotated[int, Field(ge=1, le=128)], ...] = Field(
        (8, 16),
        min_length=1,
        max_length=6,
        description="Filters of each block (count); as many blocks as there are numbers. ISR 4.",
    )
    kernel_px: Literal[1, 3, 5, 7, 9, 11] = Field(
        5, description="Side of the convolution kernels (px). ISR 4."
    )
    pool_px: int = Field(
        4, ge=1, le=15, description="Side and step of the pooling windows (px). ISR 4."
    )
    dropout: tuple[Annotated[float, Field(ge=0, lt=1)], ...] = Field(
        (0.15, 0.30),
        description="Share of the results of each block that is set to zero while training "
        "(fraction). ISR 4.",
    )
    neurons: tuple[Annotated[int, Field(ge=1, le=4096)], ...] = Field(
        (128,),
        min_length=1,
        max_length=4,
        description="Neurons of each layer between the blocks and the two outputs (count). ISR 4.",
    )

    @property
    def n_last_cells(self) -> int:
        """Return how many windows the last block leaves of a subframe of 256 x 256 pixels."""
        side = SUBFRAME_PX
        for _ in self.filters:
            side //= self.pool_px
        return side * side

    @property
    def n_weights(self) -> int:
        """Return how many numbers training has to find (count)."""
        taps = self.kernel_px**2
        channels = (1, *self.filters)
        of_blocks = sum((taps * a + 1) * b for a, b in pairwise(channels))
        neurons = (self.filters[-1] * self.n_last_cells, *self.neurons, N_CLASSES)
        return of_blocks + sum((a + 1) * b for a, b in pairwise(neurons))

    @model_validator(mode="after")
    def _can_be_built(self) -> ReportShape:
        if self.n_last_cells == 0:
            raise ValueError(
                f"found {len(self.filters)} blocks with a pool_px of {self.pool_px}, which leave nothing of "
                f"{SUBFRAME_PX} pixels; remove a block or lower pool_px"
            )
        if len(self.dropout) != len(self.filters):
            raise ValueError(
                f"found {len(self.filters)} blocks (filters) and a dropout for {len(self.dropout)}, "
                "expected one number per block"
            )
        if self.n_weights > MAX_WEIGHTS:
            raise ValueError(
                f"found {self.n_weights:,} weights, expected at most {MAX_WEIGHTS:,}; "
                "raise pool_px, or lower filters or neurons"
            )
        return self


class Train(Section):
    """Training of the report's network (ISR 4, 5)."""

    seed: Seed = Field(
        1, description="Seed of the weights, the order of subframes and the dropout."
    )
    network: ReportShape = Field(ReportShape(), description="Shape of the network.")
    batch_size: int = Field(
        100, ge=1, le=100_000, description="Subframes per update (count). ISR 5."
    )
    epochs: int = Field(
        3,
        ge=1,
        le=100_000,
        description="Passes through the training subframes (count). ISR 5: 200.",
    )
    adam_epochs: int = Field(
        5,
        ge=0,
        le=100_000,
        description="Initial epochs with Adam; the rest use SGD (count). ISR 5: 5.",
    )
    adam_rate: float = Field(
        2e-3, gt=0, le=1, description="Learning rate of Adam. Not in the report."
    )
    sgd_rate: float = Field(
        1e-2,
        gt=0,
        le=10,
        description="Initial learning rate of SGD; decays to zero along a cosine. Not in the "
        "report.",
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="Momentum of SGD. Not in the report.")
    n_monitor: int = Field(
        1000,
        ge=1,
        le=1_000_000,
        description="Validation subframes whose loss is computed after each epoch (count).",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: CUDA if available.")
    kernels: Literal["auto", "fused", "plain"] = Field(
        "auto",
        description="Convolution blocks: fused (blobpipe's), plain (PyTorch's), auto: fused "
        "where they run.",
    )
    keep_rendered: bool = Field(
        False,
        description="On the CPU, render each copy once and keep it as float16 (0.13 MB per "
        "subframe and copy) for later epochs.",
    )
    threads: int = Field(
        2,
        ge=1,
        le=256,
        description="Threads of PyTorch (count). A setting, not taken from the machine, so that"
        " results are the same anywhere.",
    )


class DenseShape(Section):
    """Shape of the dense network: convolutions of 3 x 3 cells at strides 4, 8 and 16."""

    filters: tuple[Width, Width, Width] = Field(
        (16, 32, 48), description="Filters of the convolutions at strides 4, 8 and 16 (count)."
    )
    convolutions: tuple[Depth, Depth, Depth] = Field(
        (1, 2, 3),
        description="Convolutions at strides 4, 8 and 16 (count); at 16 each sees twice as far as the "
        "one before.",
    )


class Dense(Section):
    """Training of the dense network (not in the report)."""

    seed: Seed = Field(
        1, description="Seed of the weights, the clutter and what is drawn in every epoch."
    )
    network: DenseShape = Field(DenseShape(), description="Shape of the network.")
    batch_size: int = Field(32, ge=1, le=100_000, description="Subframes per update (count).")
    epochs: int = Field(
        3, ge=1, le=100_000, description="Passes through the training subframes (count)."
    )
    rate: float = Field(
        4e-3,
        gt=0,
        le=1,
        description="Peak learning rate of AdamW; decays to zero along a cosine.",
    )
    crop_px: int = Field(
        128,
        ge=32,
        le=256,
        multiple_of=16,
        description="Side of the part of a subframe that is shown (px).",
    )
    strength: tuple[Positive, Positive] = Field(
        (0.2, 1.2),
        description="Range of the factor on a blob's amplitude, uniform in its logarithm, down "
        "to the noise.",
    )
    ragged_frac: Fraction = Field(
        0.5, description="Share of blobs made ragged: stretched and uneven, as real blobs are."
    )
    noise_sigma: float = Field(
        0.4,
        ge=0,
        le=10,
        description="Maximum white noise added (sigma); images differ in their noise.",
    )
    min_snr: float = Field(
        3.0, ge=0, description="Blobs below this matched-filter S/N are ignored by the loss."
    )
    clutter_frac: Fraction = Field(0.5, description="Share of subframes with clutter over them.")
    n_clutter: int = Field(512, ge=1, le=10_000, description="Different pieces of clutter (count).")
    focus: float = Field(
        0.0, ge=0, le=5, description="Exponent of the focal loss; 0: cross entropy."
    )
    n_monitor: int = Field(
        500,
        ge=1,
        le=1_000_000,
        description="Validation subframes whose loss is computed after each epoch (count).",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: CUDA if available.")
    threads: int = Field(
        2,
        ge=1,
        le=256,
        description="Parts of a batch differentiated in parallel, each with its own batch "
        "normalisation (count).",
    )


class Vetting(Section):
    """Why a candidate is no new blob; chosen on simulated images and one real pair of dates."""

    min_radius_px: Positive = Field(
        1.5, description="too_sharp: a blob is blurred to at least this radius (px)."
    )
    max_bad_frac: Fraction = Field(
        0.333333,
        description="bad_stack_pixels: share of bad pixels in a footprint from which it is no blob (fraction).",
    )
    hard_edge_sigma: Positive = Field(
        1.3,
        description="hard_edges: what smoothing takes from a blob, in units of the noise, beyond hard_edge_frac.",
    )
    hard_edge_frac: Positive = Field(
        0.13,
        description="hard_edges: and as a share of its depth (fraction); clusters of 3 to 7 px lose more.",
    )
    rms_ring_px: tuple[float, float] = Field(
        (4.0, 8.0),
        description="flicker: ring around a footprint with which its RMS is compared, from its edge (px).",
    )
    rms_core_margin_px: Positive = Field(
        1.6,
        description="flicker: a cluster of bad pixels is smaller by this than the blob fitted to it (px).",
    )
    min_rms_ratio: Positive = Field(
        1.2, description="flicker: RMS of the core, in units of the ring's upper quartile."
    )
    max_depth_over_rms: Positive = Field(
        10.0,
        description="flicker: a deeper signal, in units of the excess RMS, is no flicker; one outburst on 27 images "
        "is 5 times its own.",
    )
    bright_stack_frac: Positive = Field(
        0.65,
        description="bright_stack: share of the signal by which the stack is brighter than around (fraction).",
    )
    dip_reach_radii: Positive = Field(
        1.5,
        description="counterpart: reach of a known blob's crescents, in its radii, beyond dip_margin_px.",
    )
    dip_margin_px: Positive = Field(
        3.0,
        description="counterpart: the largest shift that leaves crescents and not two blobs (px).",
    )
    min_counterpart: Positive = Field(
        0.5,
        description="counterpart: height of the negative crescent, as a share of the positive one (fraction).",
    )
    min_counterpart_snr: Positive = Field(
        3.0,
        description="counterpart: and in units of the noise of the mean that it is measured in.",
    )
    hidden_shift_px: Positive = Field(
        0.5,
        description="counterpart: shift that moves in what the border has hidden of a known blob, and leaves no counterpart (px).",
    )
    hidden_frac: Fraction = Field(
        0.1,
        description="counterpart: share of a known blob without values from which the border cuts it (fraction).",
    )
    known_px: Positive = Field(
        3.0,
        description="catalogued: a candidate within this distance of a known blob is that blob (px).",
    )
    known_radii: Positive = Field(
        0.5,
        description="catalogued: the same, in radii of the known blob; the larger distance counts.",
    )


class Detect(Section):
    """Search of whole images by the dense network, and its operating point (not in the report)."""

    seed: Seed = Field(
        1,
        description="Seed of the blobs superimposed on training images to train the joint score.",
    )
    false_alarms_per_100_frames: Positive = Field(
        5.0,
        description="False-alarm budget: accepted false alarms per 100 images (count). It sets "
        "the threshold of the dense network, and those at which the detectors are "
        "compared.",
    )
    new_blobs_per_100_frames: Positive = Field(
        5.0,
        description="New blobs per 100 images (count): the prior of the probabilities. About 17"
        " a year landed.",
    )
    confidence: float = Field(
        0.9,
        ge=0.5,
        lt=1.0,
        description="One-sided confidence with which the budget is kept, as far as the number of "
        "images without a new blob allows (fraction).",
    )
    n_draws: int = Field(
        1,
        ge=1,
        le=100,
        description="Times that blobs and structure are superimposed on each training image to train the "
        "joint score (count).",
    )
    n_noise: int = Field(
        100,
        ge=1,
        le=100_000,
        description="Simulated images of noise and blobs from which the joint score learns to tell them "
        "apart (count).",
    )
    n_quiet: int = Field(
        200,
        ge=0,
        le=100_000,
        description="Simulated images without a new blob on which the threshold rests besides those "
        "that are held out (count); none for images that the campaign has not simulated.",
    )
    threads: int = Field(2, ge=1, le=256, description="Images searched in parallel (count).")


class Deep(Section):
    """Search of the latest images together, and an optional stage that measures it (not in the report)."""

    seed: Seed = Field(1, description="Seed of the blobs superimposed on the campaign's images.")
    snrs: tuple[Positive, ...] = Field(
        (1.3, 1.8, 2.5, 3.5, 5.0, 7.5),
        min_length=1,
        description="S/N of the superimposed blobs on a single image.",
    )
    n_landings: int = Field(
        3,
        ge=1,
        le=100,
        description="Images from which superimposed blobs are there, evenly spaced (count).",
    )
    margins: tuple[LogOdds, LogOdds, LogOdds, LogOdds, LogOdds] = Field(
        (0.8, 1.0, 1.3, 0.8, 1.2),
        description="By how much the thresholds of the latest 2, 4, 8, 16 and 32 images together lie above "
        "that of a single one (log-odds). Chosen on two simulated campaigns so that all these searches "
        "together keep the false-alarm budget.",
    )


class Evaluate(Section):
    """Evaluation on validation subframes (ISR 6)."""

    seed: Seed = Field(1, description="Seed of the bootstrap.")
    threshold: Fraction = Field(
        0.5, description="Probability from which a subframe counts as 'blob'. ISR 6."
    )
    n_bootstrap: int = Field(
        1000, ge=10, le=100_000, description="Resamplings behind each interval (count)."
    )
    n_gallery: int = Field(
        6, ge=1, le=100, description="Saliency maps shown for each kind of result (count)."
    )
    radii_px: tuple[Positive, ...] = Field(
        (3.0, 4.0, 5.0, 6.0, 7.0, 8.0),
        min_length=1,
        description="Top-hat radii of the matched filter (px). Measured sizes.",
    )


class Regression(Section):
    """The historical cases and the gate (ISR 7)."""

    threshold: Fraction = Field(
        0.5,
        description="Probability from which the report's network classifies a subframe as "
        "'blob'. ISR 6.",
    )
    min_cases: int = Field(
        100, ge=0, description="Gate: minimum number of cases (count). ISR 7: over 100."
    )
    min_recall: Fraction = Field(0.6, description="Gate: minimum recall of all new blobs.")
    min_recall_snr_gt_7: Fraction = Field(
        0.8, description="Gate: minimum recall of new blobs with matched-filter S/N above 7."
    )
    max_false_alarms_per_frame: float = Field(
        3.0, ge=0, description="Gate: maximum false alarms per image. ISR 6: about two."
    )
    min_dense_recall_snr_gt_7: Fraction = Field(
        0.85,
        description="Gate: the dense network's minimum recall of new blobs with S/N above 7. "
        "Not in the report.",
    )
    max_dense_false_alarms_per_100_frames: float = Field(
        10.0,
        ge=0,
        description="Gate: the dense network's maximum false alarms per 100 images; about twice"
        " the budget. Not in the report.",
    )
    n_gallery: int = Field(12, ge=1, le=200, description="Cases shown in the gallery (count).")


class Completeness(Section):
    """Blobs injected into held-out images: which are found (not in the report)."""

    seed: Seed = Field(1, description="Seed of positions, shapes and order.")
    radii_px: tuple[Positive, ...] = Field(
        (3.0, 4.0, 5.5, 7.0, 9.0), min_length=1, description="Radii (px). Measured sizes."
    )
    depths_frac: tuple[Fraction, ...] = Field(
        (0.004, 0.006, 0.009, 0.013, 0.02, 0.03, 0.05, 0.1),
        min_length=1,
        description="Depths (fraction of the light), from invisible to strong.",
    )
    n_per_cell: int = Field(
        24, ge=1, le=10_000, description="Blobs of each radius and depth (count)."
    )
    threads: int = Field(2, ge=1, le=256, description="Images searched in parallel (count).")


class Explore(Section):
    """The report's alternatives, an optional stage (ISR 7): an autoencoder, and embeddings of validation subframes."""

    seed: Seed = Field(1, description="Seed of the autoencoder, the embeddings and the folds.")
    n_train: int = Field(
        1000,
        ge=1,
        le=20_000,
        description="Maximum number of training subframes without blobs for the autoencoder "
        "(count).",
    )
    n_validation: int = Field(
        1000,
        ge=20,
        le=20_000,
        description="Maximum number of validation subframes scored and embedded (count).",
    )
    epochs: int = Field(
        6,
        ge=1,
        le=10_000,
        description="Passes of the autoencoder through its training subframes (count). Not in "
        "the report.",
    )
    batch_size: int = Field(
        20,
        ge=1,
        le=10_000,
        description="Subframes per update of the autoencoder (count). Not in the report.",
    )
    rate: float = Field(2e-3, gt=0, le=1, description="Learning rate of Adam. Not in the report.")
    smooth_px: float = Field(
        3.0,
        gt=0,
        le=64,
        description="Standard deviation of the Gaussian that smooths the map of squared errors "
        "(px); about a blob's core.",
    )
    bin_px: Literal[2, 4, 8, 16, 32] = Field(
        8,
        description="Side of the squares whose means are embedded as pixels (px); about a "
        "blob's diameter.",
    )
    neighbours: int = Field(
        15,
        ge=2,
        le=1000,
        description="Neighbours that UMAP joins, and that vote on a subframe (count). UMAP's "
        "default.",
    )
    perplexity: float = Field(
        30.0, ge=2, le=1000, description="Perplexity of t-SNE (count of neighbours). Its default."
    )
    threads: int = Field(
        2,
        ge=1,
        le=256,
        description="Threads of PyTorch (count). A setting, so that results are the same anywhere.",
    )


class Span(Section):
    """Range from which a number is drawn."""

    low: float = Field(0.0, description="Lowest value.")
    high: float = Field(1.0, description="Highest value.")
    log: bool = Field(False, description="Draw evenly in the logarithm.")

    @model_validator(mode="after")
    def _is_range(self) -> Span:
        if self.low >= self.high:
            raise ValueError(f"found low {self.low} and high {self.high}, expected low < high")
        if self.log and self.low <= 0:
            raise ValueError(f"found log with low {self.low}, expected a low above 0")
        return self


def _frozen(value: Any) -> Any:
    """Return a value with tuples in place of lists, at any depth."""
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


Choices = Annotated[tuple[Any, ...], Field(min_length=1), AfterValidator(_frozen)]


class Search(Section):
    """Search for better settings of the report's network, an optional stage (ISR 4 and 7 wish for a grid or random search)."""

    seed: Seed = Field(1, description="Seed of the points that are tried.")
    sampler: Literal["random", "grid", "tpe"] = Field(
        "random",
        description="random and grid: points drawn beforehand; tpe: each from the results of the earlier "
        "ones (tree-structured Parzen estimator), which depend on the number of workers.",
    )
    n_trials: int = Field(
        60,
        ge=1,
        le=100_000,
        description="Points to try (count); the first has the present settings.",
    )
    n_seeds: int = Field(
        1,
        ge=1,
        le=100,
        description="Trainings of each point, with different initial weights (count).",
    )
    n_workers: int = Field(2, ge=1, le=1000, description="Jobs that share the trials (count).")
    threads: int = Field(1, ge=1, le=256, description="Threads of each worker (count).")
    objective: Literal["loss", "missed"] = Field(
        "loss",
        description="Quantity to minimise, on validation subframes alone. loss: cross entropy; missed: "
        "share of subframes with blobs that are missed at a false-positive rate of 1 %.",
    )
    prune: bool = Field(
        True,
        description="Stop a training whose validation loss after an epoch is above the median of earlier "
        "trials; which are stopped depends on the order of work.",
    )
    n_train: int = Field(
        4000,
        ge=2,
        le=1_000_000,
        description="Training subframes that each training sees (count); they are rendered once, and take "
        "0.13 MB each and for each augmented copy.",
    )
    n_validation: int = Field(
        1000,
        ge=2,
        le=1_000_000,
        description="Validation subframes that a point is judged by (count).",
    )
    space: dict[str, Choices | Span] = Field(
        {
            "network.filters": ((8,), (8, 16), (16, 32), (8, 16, 32)),
            "network.kernel_px": (3, 5, 7),
            "network.pool_px": (2, 4),
            "network.neurons": ((32,), (128,), (256,)),
            "network.dropout": ((0.0,), (0.15, 0.3), (0.3, 0.5)),
            "batch_size": (50, 100, 200),
            "epochs": (2, 3, 5),
        },
        min_length=1,
        description="Settings of train that vary, and their values: a list, or a range {low, high, log}. "
        "The last number of a dropout counts for all further blocks. The report's list (ISR 7).",
    )

    @model_validator(mode="after")
    def _can_be_drawn(self) -> Search:
        for key, values in self.space.items():
            if isinstance(values, Span):
                if self.sampler == "grid":
                    raise ValueError(
                        f"space.{key}: found a range, expected a list of values for a grid"
                    )
                values = (values.low, values.high)
            if key in ("network", "n_monitor", "keep_rendered", "threads"):
                raise ValueError(f"space: found {key}, which a search cannot vary; remove it")
            for value in values:
                if value == ():
                    raise ValueError(f"space.{key}: found an empty list, expected one with numbers")
                try:
                    varied(Train(), {key: value})
                except (KeyError, TypeError):
                    raise ValueError(
                        f"space: found {_short(key)}, expected a setting of train, such as network.filters"
                    ) from None
                except ValidationError as error:
                    fault = error.errors()[0]
                    if fault["loc"][-1:] != (
                        "network",
                    ):  # a whole network depends on other values too
                        raise ValueError(
                            f"space.{key}: found {_short(str(value))}, {fault['msg']}"
                        ) from None
        return self


def varied(train: Train, values: Mapping[str, Any]) -> Train:
    """Return settings of the training with other values.

    Parameters
    ----------
    train : Train
    values : mapping
        By the name of the setting, such as ``network.filters``. A dropout is cut to the number of blocks, or its
        last number repeated.

    Raises
    ------
    KeyError
        If there is no such setting.
    ValidationError
        If the values do not fit.
    """
    content = json.loads(train.model_dump_json())
    for name, value in values.items():
        *path, key = name.split(".")
        section = functools.reduce(dict.__getitem__, path, content)
        is_whole = isinstance(section[key], int) and isinstance(value, float) and value.is_integer()
        section[key] = int(value) if is_whole else value
    network = content["network"]
    dropout, filters = network["dropout"], network["filters"]
    if all(isinstance(values, list | tuple) for values in (dropout, filters)):
        n_blocks = len(filters)
        network["dropout"] = [*dropout, *[*dropout][-1:] * n_blocks][:n_blocks]
    return Train.model_validate_json(json.dumps(content))


class Quicklook(Section):
    """The daily routine (not in the report)."""

    settle_s: float = Field(
        2.0,
        ge=0,
        le=3600,
        description="Time without change after which a file counts as complete (s).",
    )
    match_px: Positive = Field(
        3.0,
        description="Two detections within this distance, after correction for the CSM shift, "
        "belong to one candidate (px).",
    )
    fade_after: int = Field(
        3,
        ge=1,
        le=10,
        description="Later images that do not show a new candidate before it counts as faded "
        "(count).",
    )
    operating_point: str = Field(
        "",
        description="File of 'blobpipe calibrate' whose threshold replaces the model's, relative to "
        "the working folder; empty: the model's threshold.",
    )


class Notices(Section):
    """Notices of new blobs (not in the report). Logins and the webhook's address come from the environment, never from here."""

    mail_to: tuple[Address, ...] = Field(
        (), description="Mail addresses of the team; none: no mail."
    )
    mail_from: Annotated[str, AfterValidator(_mail_address)] = Field(
        "", description="Mail address of the sender."
    )
    smtp_host: Annotated[str, AfterValidator(_host)] = Field(
        "", description="Name of the mail server, as in its certificate."
    )
    smtp_port: int = Field(
        587,
        ge=1,
        le=65_535,
        description="Port of the mail server: usually 587 for starttls, 465 for tls.",
    )
    security: Literal["starttls", "tls", "none"] = Field(
        "starttls",
        description="Encryption of the mail connection; none: for a relay on this machine, "
        "without a login.",
    )
    webhook: bool = Field(
        False, description="Also post notices to BLOBPIPE_WEBHOOK_URL, in Slack's format."
    )
    digest: Literal["none", "daily", "weekly"] = Field(
        "none",
        description="Summary of each day or week (Monday to Sunday, UTC) on which images were "
        "logged.",
    )
    page_url: str = Field("", description="Address of the review page, for links; empty: no links.")
    attempts: int = Field(
        20,
        ge=1,
        le=1000,
        description="Attempts to send a notice before it is given up (count). With the default "
        "waits, 3 days.",
    )
    first_wait_s: float = Field(
        60.0,
        gt=0,
        le=86_400,
        description="Wait after the first failure (s); doubled after each further one.",
    )
    longest_wait_s: float = Field(
        21_600.0, gt=0, le=604_800, description="Longest wait between two attempts (s)."
    )
    timeout_s: float = Field(
        20.0,
        gt=0,
        le=600,
        description="Time limit for each answer of a server (s); for a whole message, three "
        "times as long.",
    )

    @model_validator(mode="after")
    def _sendable(self) -> Notices:
        if self.mail_to and not (self.mail_from and self.smtp_host):
            raise ValueError("mail_to is set: expected mail_from and smtp_host too")
        return self


class Health(Section):
    """Limits of the health readings (not in the report). A reading covers the latest images, in the order of the log."""

    window: int = Field(
        20,
        ge=3,
        le=1000,
        description="Images in a reading (count); a single odd image does not cross a limit.",
    )
    baseline: int = Field(
        100,
        ge=10,
        le=10_000,
        description="Images before the window with which probabilities are compared, and behind"
        " a rate (count).",
    )
    noise_frac: Positive = Field(
        0.013,
        description="Maximum median noise of the differences (fraction of the light). Measured:"
        " 0.0101, varying with the airglow; a third more noise costs a third of the"
        " S/N.",
    )
    signal_e: Range = Field(
        (12_000.0, 30_000.0),
        description="Range of the median photon level (electrons per pixel). Measured.",
    )
    shift_px: Positive = Field(
        0.5,
        description="Maximum median CSM shift (px). Usual shifts are 0.1 px; a lasting shift "
        "calls for a new stack.",
    )
    clipped_frac: Fraction = Field(
        0.05,
        description="Maximum median share of clipped pixels. Bad pixels and the tails of the "
        "noise make 2 %.",
    )
    false_alarms_per_100: Positive = Field(
        15.0,
        description="Maximum number of candidates per 100 images that faded or were rejected "
        "(count); three times the budget.",
    )
    probability_distance: Fraction = Field(
        0.2,
        description="Maximum Kolmogorov-Smirnov distance of the subframes' probabilities from "
        "those of the baseline. By chance, 0.1 is exceeded once in a hundred.",
    )
    rejected_frac: Fraction = Field(
        0.2,
        description="Maximum share of rejected images; more means that something upstream broke.",
    )
    blobs_deeper_frac: Positive = Field(
        0.1,
        description="Maximum median change of the depth of the known blobs (fraction), the latest 16 "
        "images compared with the 30 before.",
    )
    blobs_moved_px: Positive = Field(
        0.3, description="Maximum median displacement of the known blobs (px)."
    )
    blobs_grown_px: Positive = Field(
        0.5, description="Maximum median change of the radius of the known blobs (px)."
    )
    blobs_changed: Positive = Field(
        3.5,
        description="Maximum number of single known blobs that have changed (count).",
    )
    hysteresis_frac: Fraction = Field(
        0.1,
        description="A reading has recovered when it is within its limit by this share of it, "
        "so that a fluctuation causes no second notice.",
    )


class Params(Section):
    """The whole of ``params.yaml``."""

    detector: str = Field(
        "wfc3_ir",
        min_length=1,
        description="Name of an included detector (wfc3_ir, ...), or the path of your own file.",
    )
    campaign: Campaign = Campaign()
    bad_pixels: BadPixels = BadPixels()
    difference: Difference = Difference()
    clip: Clip = Clip()
    scale: Scale = Scale()
    cutout: Cutout = Cutout()
    augment: Augment = Augment()
    train: Train = Train()
    dense: Dense = Dense()
    vetting: Vetting = Vetting()
    detect: Detect = Detect()
    evaluate: Evaluate = Evaluate()
    regression: Regression = Regression()
    completeness: Completeness = Completeness()
    deep: Deep = Deep()
    explore: Explore = Explore()
    search: Search = Search()
    quicklook: Quicklook = Quicklook()
    notices: Notices = Notices()
    health: Health = Health()

    @model_validator(mode="after")
    def _room(self) -> Params:
        after = self.campaign.n_frames - max(self.campaign.first_frames, self.difference.stack_size)
        if self.campaign.n_cases >= after:
            raise ValueError(
                f"campaign.n_cases={self.campaign.n_cases} leaves no image without a new blob: expected fewer than "
                f"{after}, the images after the first stack; lower n_cases or raise n_frames"
            )
        return self


def load_params(path: str | Path = "params.yaml") -> Params:
    """Read and check a parameter file.

    Raises
    ------
    ParamsError
        One line that names the file, the key, what was found and what was expected.
    """
    found = read_yaml(path)
    if not isinstance(found, dict):
        kind = "nothing" if found is None else type(found).__name__
        raise ParamsError(
            f"{path}: found {kind}, expected sections {', '.join(Params.model_fields)}"
        )
    try:
        params = Params.model_validate_json(json.dumps(found))
    except (ValidationError, TypeError, ValueError) as error:
        raise ParamsError(f"{path}: {short_fault(error)}") from error
    for key, default in _flat(Params()):
        if not _holds(found, key.split(".")):
            raise ParamsError(
                f"{path}: {key} is missing; the whole file is read, so add it "
                f"(its default is {json.dumps(default)})"
            )
    return params


def _flat(section: Section, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every setting and its value, by its whole name, such as ``train.network.filters``."""
    for key, value in section:
        whole = f"{name}.{key}" if name else key
        if isinstance(value, Section):
            yield from _flat(value, whole)
        else:
            yield whole, value


def _holds(found: Any, keys: list[str]) -> bool:
    """Return whether nested mappings hold a key of a key."""
    if not keys:
        return True
    return isinstance(found, dict) and keys[0] in found and _holds(found[keys[0]], keys[1:])


def short_fault(error: Exception) -> str:
    """Return the first fault that a check has found, in one line: its key, what was found, what was expected."""
    if not isinstance(error, ValidationError):
        return " ".join(str(error).split())
    fault = error.errors()[0]
    key = _short(".".join(map(str, fault["loc"])))
    if fault["type"] == "missing":
        return f"{key} is missing; add it"
    if fault["type"] == "extra_forbidden":
        return f"unknown key {key}; 'blobpipe params' prints all keys"
    if fault["type"] == "value_error":
        return f"{key}: {fault['ctx']['error']}".removeprefix(": ")
    return f"{key}: found {_short(json.dumps(fault['input']))}, expected: {fault['msg'][0].lower()}{fault['msg'][1:]}"


def _short(text: str) -> str:
    """A text from a file, on one line and not longer than a line."""
    plain = text if text.isprintable() else json.dumps(text)
    return plain if len(plain) <= 80 else f"{plain[:77]}..."


# ---------------------------------------------------------------- YAML


def read_yaml(path: str | Path) -> Any:
    """Read a YAML file by `parse_yaml`."""
    return parse_yaml(text_of(path), path)


def text_of(path: str | Path) -> str:
    """Read a text file, if it is one and not too long.

    Raises
    ------
    ParamsError
        One line that names the file, what was found and what was expected.
    """
    try:
        state = Path(path).stat()
        if not stat.S_ISREG(state.st_mode):
            kind = "a folder" if stat.S_ISDIR(state.st_mode) else "a pipe or a device"
            raise ParamsError(f"{path}: found {kind}, expected a YAML file")
        if state.st_size > MAX_BYTES:
            raise ParamsError(
                f"{path}: found {state.st_size} bytes, expected a YAML file of at most {MAX_BYTES}"
            )
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise ParamsError(
            f"{path}: not found, expected a YAML file; correct the name, or run this where the file is"
        ) from error
    except (OSError, ValueError) as error:  # ValueError: other bytes than UTF-8
        reason = error.strerror if isinstance(error, OSError) else error
        raise ParamsError(
            f"{path}: cannot be read as YAML: {reason}; expected a text file in UTF-8"
        ) from error


def parse_yaml(text: str, path: str | Path) -> Any:
    """Parse YAML of plain values, in which nothing is said twice.

    Aliases, tags and dates are refused: they make of a short text a huge one, or another thing than what it looks like.

    Raises
    ------
    ParamsError
        One line that names the file, the line in it, what was found and what was expected.
    """
    conflict = CONFLICT.search(text)
    if conflict:
        raise ParamsError(
            f"{path}: line {text.count(chr(10), 0, conflict.start()) + 1}: found {conflict[1]}, the mark of a merge that git "
            f"could not settle; keep one side ('git checkout --ours {path}' or '--theirs') and run again"
        )
    try:
        _check_form(text)
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check_values(node)
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ParamsError(f"{path}: {_yaml_fault(error, text)}") from error
    except (ValueError, ArithmeticError) as error:  # a number of thousands of digits
        raise ParamsError(f"{path}: cannot be read as YAML: {_short(str(error))}") from error


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """The one in C, ten times faster, where there is one."""


def _check_form(text: str) -> None:
    """Refuse, before anything is built of it, what would be more or other than it looks."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.AliasEvent):
            _refuse(event, f"found the alias *{event.anchor}, expected the value itself")
        tag = getattr(event, "tag", None)
        if tag:
            _refuse(event, f"found the tag {_short(tag)}, expected a value without one")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            _refuse(event, f"found more than {MAX_DEPTH} levels of nesting")


def _check_values(node: yaml.Node) -> None:
    """Refuse keys that are listed twice, and values that are no plain ones."""
    if node.tag not in PLAIN:
        # or merge, or value
        kind = node.tag.removeprefix("tag:yaml.org,2002:").replace("timestamp", "date")
        _refuse(node, f"found a {kind}, expected a number, a text, a list or a section")
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_values(item)
    if isinstance(node, yaml.MappingNode):
        seen: set[tuple[str, str]] = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                _refuse(key, "found a list or a section in place of a key")
            if (key.tag, key.value) in seen:
                _refuse(key, f"{_short(key.value)} is listed twice; remove one")
            seen.add((key.tag, key.value))
            _check_values(key)
            _check_values(value)


class _Refusal(yaml.MarkedYAMLError):
    """YAML, but not what we take."""


def _refuse(place: Any, problem: str) -> None:
    raise _Refusal(problem=problem, problem_mark=place.start_mark)


def _yaml_fault(error: yaml.YAMLError, text: str) -> str:
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return f"cannot be read as YAML: {' '.join(str(error).split())}"
    mark = error.problem_mark
    problem = " ".join(f"{error.context or ''} {error.problem}".split())
    if isinstance(error, _Refusal):
        return f"line {mark.line + 1}: {problem}"
    if "cannot start any token" in problem:
        problem += f": {text[mark.index : mark.index + 1]!r}"  # most often a tab
    return f"cannot be read as YAML: line {mark.line + 1}: {problem}"


def to_yaml(params: Params) -> str:
    """``params`` as a commented YAML file that `load_params` reads back."""
    lines = [
        "# All settings of blobpipe. One section per stage; 'blobpipe params' prints the defaults.",
        "",
    ]
    for name, section in params:
        if isinstance(section, Section):
            lines += [f"# {type(section).__doc__}", f"{name}:", *yaml_lines(section, "  "), ""]
        else:
            about = type(params).model_fields[name].description
            lines += [f"# {about}", f"{name}: {_yaml_value(section)}", ""]
    return "\n".join(lines[:-1]) + "\n"


def yaml_lines(section: Section, indent: str = "") -> Iterator[str]:
    """Yield a line for each setting of a section, and of the sections in it, with its meaning as a comment."""
    for key, field in type(section).model_fields.items():
        value = getattr(section, key)
        if isinstance(value, Section):
            yield f"{indent}{key}:  # {type(value).__doc__}"
            yield from yaml_lines(value, f"{indent}  ")
        elif isinstance(value, dict) and value:
            yield f"{indent}{key}:  # {field.description}"
            for name, item in section.model_dump(mode="json")[key].items():
                yield f"{indent}  {name}: {_yaml_value(item)}"
        else:
            yield f"{indent}{key}: {_yaml_value(value)}  # {field.description}"


def _yaml_value(value: Any) -> str:
    """Return a value as YAML on one line; text without quotes where YAML allows it, as DVC writes it back."""
    if not isinstance(value, str):
        return json.dumps(value)
    plain = yaml.safe_dump(value, width=MAX_BYTES, allow_unicode=True).removesuffix("...\n")
    return plain.strip() if plain.strip() in (value, "''") else json.dumps(value)


def json_schema() -> str:
    """The JSON schema of ``params.yaml``, for editors."""
    return json.dumps(Params.model_json_schema(), indent=2, sort_keys=True) + "\n"
