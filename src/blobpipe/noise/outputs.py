"""Measure and subtract the noise that the outputs of a detector share.

An infrared detector is read through several outputs at once, each of which has a part of the image of its own.
What disturbs all of them (references, supplies, the controller) is added to the pixels that are read at the same
moment: it is the same in each part, in the order of reading, which usually turns around from part to part. So the
noise of one output is known from the others, which see other sky.

In the waves of each part, F_j(k) = common(k) + own_j(k), of the powers c(k) and u(k), the best estimate of
common from the n - 1 other outputs is ``g(k) * sum of the others``, with g = c / (u + (n - 1) c) (Wiener). Cosines
are the waves, since the noise of a part does not go around it. Both powers are measured: the mean of all parts has
u / n + c, what they differ from it by has u.

Source: ours. Noise of this kind is described by S. H. Moseley et al., Proc. SPIE 7742, 36 (2010), and
B. J. Rauscher, PASP 127, 1144 (2015); there reference pixels tell it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import scipy.fft

from blobpipe.core.arrays import FloatArray, Image, Mask
from blobpipe.noise.spectrum import level_of, noise_alone, smooth_power

# Sides of whole detectors are multiples of this (px); images come without up to so many reference pixels in all
FULL_PX = 256
MOST_REFERENCE_PX = 16

# Least side of a part (px): Euclid's outputs have 64
LEAST_PX = 64

# Side of the cells in which it is asked whether outputs share noise (px), less than that of most blobs, and the
# least share of an output's variance that the others must explain
CELL_PX = 8
LEAST_SHARED = 0.05

# Width of what lies beside the border of a part (px), where a pixel is read with its neighbour beyond it, or nearly so,
# and by what it is multiplied before it is asked what stands out of the noise
BORDER_PX = 16
BORDER_DOUBT = np.float32(0.6)

# How many times as large as by chance the correlation of outputs is, at least, where they share noise, and how
# often chance is tried
CLEARLY = 5.0
N_CHANCES = 6


class Layout(NamedTuple):
    """How the outputs of a detector divide an image.

    Attributes
    ----------
    rows, columns : int
        Parts along y and x (count).
    is_mirrored : bool
        Whether every second part is read in the opposite direction.
    """

    rows: int
    columns: int
    is_mirrored: bool

    @property
    def n_outputs(self) -> int:
        """Return the number of outputs."""
        return self.rows * self.columns

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Return whether an image of this shape can be divided so, into parts of some cells."""
        return all(
            side % (n * CELL_PX) == 0 and side >= n * LEAST_PX
            for side, n in zip(shape, (self.rows, self.columns), strict=True)
        )

    def divide(self, image: Image) -> Image:
        """Return the parts in the order of reading: (ny, nx) to (outputs, ny / rows, nx / columns)."""
        ny, nx = image.shape
        parts = image.reshape(self.rows, ny // self.rows, self.columns, nx // self.columns)
        return self._turned(parts.swapaxes(1, 2)).reshape(
            self.n_outputs, ny // self.rows, nx // self.columns
        )

    def join(self, parts: Image) -> Image:
        """Return the image of these parts: the inverse of `divide`."""
        _, ny, nx = parts.shape
        turned = self._turned(parts.reshape(self.rows, self.columns, ny, nx))
        return turned.swapaxes(1, 2).reshape(self.rows * ny, self.columns * nx)

    def _turned(self, parts: Image) -> Image:
        """Turn around what is read in the opposite direction, shape (rows, columns, ny, nx)."""
        if not self.is_mirrored:
            return parts
        turned = parts.copy()
        turned[1::2] = turned[1::2, :, ::-1]
        turned[:, 1::2] = turned[:, 1::2, :, ::-1]
        return turned


# Four stripes (NIRCam, NIRISS, NIRSpec) and four quadrants (WFC3/IR, NICMOS), 32 stripes (Roman, Euclid), and
# two, eight and sixteen, which controllers of the same detectors also offer; along either axis, since images are turned
LAYOUTS = tuple(
    Layout(*parts, is_mirrored)
    for parts in (
        (2, 2),
        *((1, n) for n in (2, 4, 8, 16, 32)),
        *((n, 1) for n in (2, 4, 8, 16, 32)),
    )
    for is_mirrored in (True, False)
)


@dataclass(frozen=True)
class OutputNoise:
    """Noise that all outputs of a detector share, as far as the others tell it.

    Attributes
    ----------
    layout : Layout
    shared : ndarray, shape (ny, nx) of a part, float32
        Factor g of the sum of the other outputs, for each cosine in the order of `scipy.fft.dctn`.
    """

    layout: Layout
    shared: Image

    def whiten(self, image: Image, gain: Image | None) -> Image:
        """Return an image without what outputs share, of which the waves of each part are multiplied.

        Parts are filtered by themselves: beyond the border between two outputs the noise is another.

        Parameters
        ----------
        image : ndarray, shape (ny, nx), float32
            NaN where there is no value.
        gain : ndarray, shape (ny, nx) of a part, float32, or None
            Factor of each cosine; None for 1.

        Returns
        -------
        ndarray, shape (ny, nx), float32
            In the same unit, NaN where the image has no value. What stands out of the noise of an image leaves no
            trace in its other parts.
        """
        return self._without(image, self._common(self.noise_of(image, gain)), gain)

    def noise_of(self, image: Image, gain: Image | None) -> Image:
        """Return the noise of an image as `spectrum.noise_alone` does, with what the others tell where a part tells nothing.

        More stands out of the whitened image than of the image itself: that is left out, too.
        """
        whitened = self._without(image, self._common(noise_alone(image)), gain)
        alone = noise_alone(image, self._doubted(whitened))
        unknown = alone == 0
        alone[unknown] = self._image(self._common(alone), image.shape)[unknown]
        return alone

    def _without(self, image: Image, common: Image, gain: Image | None) -> Image:
        """Return an image without these cosines in each part, of which the rest is multiplied."""
        missing = ~np.isfinite(image)
        level = level_of(image)
        waves = self._waves(np.where(missing, np.float32(0), image - level)) - common
        if gain is not None:
            waves *= gain
        whitened = self._image(waves, image.shape) + level
        whitened[missing] = np.nan
        return np.asarray(whitened, np.float32)

    def _doubted(self, image: Image) -> Image:
        """Return an image that is fainter where parts meet: what stands out there may be noise that they share."""
        doubted = image - level_of(image)
        for axis, n in ((0, self.layout.rows), (1, self.layout.columns)):
            side = image.shape[axis] / n
            for k in range(1, n):
                border = slice(round(k * side) - BORDER_PX, round(k * side) + BORDER_PX)
                doubted[(slice(None),) * axis + (border,)] *= BORDER_DOUBT
        return doubted

    def is_at_border(self, x: FloatArray, y: FloatArray, within: float = BORDER_PX) -> Mask:
        """Tell which positions (px) lie beside the border of a part, nearer than so many pixels, shape (n,)."""
        ny, nx = self.shared.shape
        return np.asarray((_from_border(x, nx) < within) | (_from_border(y, ny) < within))

    def frequencies(self) -> tuple[FloatArray, FloatArray]:
        """Return the frequencies of the cosines along y and x (cycles per pixel)."""
        ny, nx = self.shared.shape
        return np.arange(ny) / (2 * ny), np.arange(nx) / (2 * nx)

    def transfer(
        self, gain: Image, period_px: int, n_waves: int, place: tuple[float, float]
    ) -> FloatArray:
        """Return by what `whiten` multiplies the cosines of which a small feature consists.

        A part is filtered as if it went on as its own mirror image, so that a row of the feature counts twice, the more the
        nearer it is to the border.

        Parameters
        ----------
        gain : ndarray, shape (ny, nx) of a part, float32
            Factor of each cosine of a part.
        period_px : int
            Period of the lowest cosine (px), odd, longer than the feature.
        n_waves : int
            Number of cosines along each axis, from the constant on.
        place : (float, float)
            Where the feature is (x, y; px); nearer to the border than half of the period, that of the nearest place that
            is not.

        Returns
        -------
        ndarray, shape (n_waves, n_waves), float64
            Factor of cosines along y and x: the cosines of the answer of `whiten` to one pixel, within the period.
        """
        reach = period_px // 2
        distance = np.arange(-reach, reach + 1)
        cosines = np.cos(2 * np.pi / period_px * np.outer(np.arange(n_waves), distance))
        x, y = place
        along = []
        for n, centre in zip(gain.shape, (y, x), strict=True):
            # The answer to a pixel is that to its mirror image, in a part that is read in the opposite direction
            pixel = int(np.clip(round(centre % n), reach, n - 1 - reach))
            of_part = np.cos(np.pi / (2 * n) * np.outer(2 * (pixel + distance) + 1, np.arange(n)))
            power = np.where(np.arange(n) > 0, 2 / n, 1 / n)
            along.append(cosines @ (power * of_part * of_part[reach]))
        return np.asarray(along[0] @ gain @ along[1].T)

    def whiten_square(
        self, square: Image, x: int, y: int, shape: tuple[int, ...], gain: Image
    ) -> Image:
        """Return what `whiten` makes of a blob, which is no noise, so that nothing is subtracted.

        Parameters
        ----------
        square : ndarray, shape (n, n), float32
            The blob, in any unit; the rest of the image is 0.
        x, y : int
            First pixel of the square (px); part of it may lie off the image.
        shape : (ny, nx)
            Of the image.
        gain : ndarray, shape (ny, nx) of a part, float32
            Factor of each cosine.

        Returns
        -------
        ndarray, shape (n, n), float32
            In the same unit, on the same pixels; NaN off the image.
        """
        image = np.zeros(shape, np.float32)
        top, left = max(y, 0), max(x, 0)
        inside = image[top : y + len(square), left : x + len(square)]
        ny, nx = inside.shape
        inside[:] = square[top - y :, left - x :][:ny, :nx]

        # Parts are filtered by themselves, so those without any of it stay 0
        parts = self.layout.divide(_whole(image))
        lit = parts.any(axis=(1, 2))
        parts[lit] = scipy.fft.idctn(_waves(parts[lit]) * gain, axes=(1, 2), norm="ortho")
        whitened = _trimmed(self.layout.join(parts), shape)
        cut = np.full_like(square, np.nan)
        cut[top - y :, left - x :][:ny, :nx] = whitened[top:, left:][:ny, :nx]
        return cut

    def _common(self, alone: Image) -> Image:
        """Return the cosines of what each part has in common with the others, by the others, of a noise image."""
        waves = self._waves(alone)
        return np.asarray(self.shared * (waves.sum(axis=0) - waves))

    def _waves(self, image: Image) -> Image:
        """Return the amplitudes of the cosines of each part of an image."""
        return _waves(self.layout.divide(_whole(image)))

    def _image(self, waves: Image, shape: tuple[int, ...]) -> Image:
        """Return the image, of this shape, of the cosines of each part."""
        parts = scipy.fft.idctn(waves, axes=(1, 2), norm="ortho")
        return _trimmed(self.layout.join(parts), shape)


def measure_output_noise(alone: Sequence[Image]) -> tuple[OutputNoise, Image] | None:
    """Measure the noise that the outputs of a detector share in one difference image, or in several alike.

    Parameters
    ----------
    alone : sequence of ndarray, shape (ny, nx), float32
        From `spectrum.noise_alone`.

    Returns
    -------
    (OutputNoise, ndarray) or None
        With the power of each cosine of what is left of an output, in units of the variance of a pixel, shape
        (ny, nx) of a part, float32. None unless in one of `LAYOUTS` the others explain at least `LEAST_SHARED`
        of an output's variance.
    """
    whole = [_whole(image) for image in alone]
    possible = [each for each in LAYOUTS if each.fits(whole[0].shape)]
    if not possible:
        return None
    cells = [_cells(image) for image in whole]
    explained = {layout: _explained(layout, cells) for layout in possible}
    layout = max(possible, key=lambda each: explained[each])
    if explained[layout] < LEAST_SHARED:
        return None

    # power of the mean of all outputs, times their number, and of what each differs from it by
    n = layout.n_outputs
    powers = []
    for image in whole:
        waves = _waves(layout.divide(image))
        mean = waves.mean(axis=0)
        powers.append((n * np.square(mean), np.square(waves - mean).sum(axis=0) / (n - 1)))
    both, own = (_smoothed(np.mean(samples, axis=0)) for samples in zip(*powers, strict=True))
    common = np.maximum(both - own, 0) / n

    # what is not known of the common noise, and what the estimate brings of the noise of the others
    shared = common / (own + (n - 1) * common)
    left = common * (1 - (n - 1) * shared) ** 2 + own * (1 + (n - 1) * shared**2)
    return OutputNoise(layout, np.asarray(shared, np.float32)), np.asarray(left, np.float32)


def _from_border(place: FloatArray, n: int) -> FloatArray:
    """Return the distance from the next multiple of a side (px); 0 for an unknown place."""
    within = np.nan_to_num(place + 0.5) % n
    return np.asarray(np.minimum(within, n - within))


def _waves(parts: Image) -> Image:
    """Return the amplitudes of the cosines of each part."""
    return np.asarray(scipy.fft.dctn(parts, axes=(1, 2), norm="ortho"))


def _smoothed(power: Image) -> FloatArray:
    """Return the smoothed power of cosines, shape (ny, nx)."""
    # as that of a part and its mirror image, in the order of `rfft2`
    both_ways = np.concatenate([power, power[::-1]]) / power.mean()
    smooth = smooth_power(np.asarray(both_ways, np.float32), 2 * power.shape[1])
    relative = np.ones(power.shape) if smooth is None else smooth[: len(power)].astype(np.float64)
    return relative * float((power / relative).mean())


def _explained(layout: Layout, cells: Sequence[Image]) -> float:
    """Return which share of the variance of an output the others explain, 0 to 1; 0 if that may be by chance."""
    parts = [layout.divide(image) for image in cells]
    # rows and columns of one output go on into the next part, too: these alone do not tell
    within = [
        part - part.mean(axis=1, keepdims=True) - part.mean(axis=2, keepdims=True) for part in parts
    ]
    correlation = _correlation(within)
    if _share(correlation, layout.n_outputs) < LEAST_SHARED:
        return 0.0
    # outputs that are moved against each other share nothing: what they seem to share is chance
    n, ny, _ = within[0].shape
    unit = max(ny // (2 * n), 1)  # odd multiples of it bring no two together
    chance = [_correlation(within, unit * k) for k in range(1, 2 * N_CHANCES, 2)]
    if correlation < CLEARLY * float(np.sqrt(np.mean(np.square(chance)))):
        return 0.0
    return _share(_correlation(parts), layout.n_outputs)


def _share(correlation: float, n: int) -> float:
    """Return which share of the variance of one of n outputs the others explain, if any two have this correlation."""
    correlation = max(correlation, 0.0)
    return (n - 1) * correlation**2 / (1 + (n - 2) * correlation)


def _correlation(parts: Sequence[Image], step: int = 0) -> float:
    """Return the mean correlation of two outputs, each being moved on by so many rows from that before it."""
    n = len(parts[0])
    if step:
        parts = [np.stack([np.roll(part[k], k * step, axis=0) for k in range(n)]) for part in parts]
    variance = float(np.mean([np.square(part).mean() for part in parts]))
    of_mean = float(np.mean([np.square(part.mean(axis=0)).mean() for part in parts]))
    return (n * of_mean / variance - 1) / (n - 1) if variance > 0 else 0.0


def _cells(image: Image) -> Image:
    """Return the means of an image over cells, less their own mean."""
    ny, nx = (side // CELL_PX for side in image.shape)
    means = image.reshape(ny, CELL_PX, nx, CELL_PX).mean(axis=(1, 3))
    return np.asarray(means - means.mean())


def _whole(image: Image) -> Image:
    """Return an image with zeros where a detector has its reference pixels, if it comes without them."""
    missing = [-side % FULL_PX for side in image.shape]
    if max(missing) > MOST_REFERENCE_PX or not any(missing):
        return image
    return np.pad(image, [(n // 2, n - n // 2) for n in missing])


def _trimmed(whole: Image, shape: tuple[int, ...]) -> Image:
    """Return what `_whole` was given, of this shape."""
    first = [(side - own) // 2 for side, own in zip(whole.shape, shape, strict=True)]
    return whole[first[0] : first[0] + shape[0], first[1] : first[1] + shape[1]]
