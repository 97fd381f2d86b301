"""Render recipes on a GPU, from data in its memory, so that a batch is made where it is used.

The same recipes give the same pixels as `render.render_subframes`, up to rounding. Here, every pixel of the batch computes its
background, its dip, its blobs and its noise at once, so that a compiler makes a few kernels of it all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from blobpipe.core import random_streams
from blobpipe.core.arrays import Int16Array
from blobpipe.images import tiles
from blobpipe.simulation import clutter, render
from blobpipe.simulation.recipes import STEP, Recipes, Scene

if TYPE_CHECKING:
    import numpy.typing as npt

# Constants of the random numbers as signed 64-bit integers, the only ones that PyTorch computes with
GOLDEN = random_streams.GOLDEN_GAMMA - 2**64
FACTORS = tuple(factor - 2**64 for factor in random_streams.MIX_FACTORS)
IMAGE_STEP = random_streams.IMAGE_GAMMA - 2**64


class Renderer:
    """Recipes and their scene in the memory of a device.

    Parameters
    ----------
    scene : Scene
    recipes : Recipes
    device : torch.device
    pieces : ndarray, shape (m, 256, 256), int16, optional
        Clutter for `vary`, from `clutter.draw_pieces`.
    """

    def __init__(
        self,
        scene: Scene,
        recipes: Recipes,
        device: torch.device,
        pieces: Int16Array | None = None,
    ) -> None:
        def put(array: npt.NDArray[np.generic]) -> Tensor:
            # A copy, since some arrays are read-only
            return torch.tensor(np.ascontiguousarray(array), device=device)

        # The scene
        self.backgrounds = put(scene.backgrounds)
        self.limits = put(scene.limits)
        self.per_frac = put(1 / scene.sigma_frac)
        self.pattern = put(scene.pattern)
        self.stamps = put(scene.stamps)
        if pieces is None:
            pieces = np.zeros((1, tiles.SIDE, tiles.SIDE), np.int16)
        self.pieces = put(pieces)
        self.quantiles = put(render.NORMAL_QUANTILES)

        # The recipes
        self.frame = put(recipes.frame)
        self.window = put(recipes.window)
        self.dip = put(recipes.dip)
        self.label = put(recipes.label)
        self.place(recipes)
        self.noise_seed = put(recipes.noise_seed.view(np.int64))
        self.turn = put(recipes.turn)
        self.copies = len(recipes.noise_seed)

        # Compiling pays on a GPU alone
        self._pixels = self._draw
        self._varied = self._draw_varied
        if device.type == "cuda":
            self._pixels = torch.compile(self._draw, dynamic=False)
            self._varied = torch.compile(self._draw_varied, dynamic=False)

    def place(self, recipes: Recipes) -> None:
        """Replace the stamps and factors of the blobs by those of other recipes, which are the same in all else."""
        device = self.label.device
        self.blob = torch.from_numpy(by_row(recipes, recipes.blob)).to(device)
        self.factor = torch.from_numpy(by_row(recipes, recipes.factor)).to(device)

    def render(self, rows: Tensor, copy: Tensor, noise_sigma: float = 0.0) -> Tensor:
        """Render rows as `render.render_subframes` does.

        Parameters
        ----------
        rows : Tensor, shape (n,), int64, on the device
        copy : Tensor, shape (), int64, on the device
            Which of the augmented copies, below `copies`.
        noise_sigma : float
            Standard deviation of the added noise (sigma).

        Returns
        -------
        Tensor, shape (n, 1, 256, 256), float32, on the device
        """
        at = copy * self.noise_seed.shape[1] + rows
        seeds = self.noise_seed.view(-1)[at]
        turns = self.turn.view(-1, 2)[at]
        return self._pixels(rows, seeds, turns, noise_sigma)[:, None]

    def vary(
        self, rows: Tensor, copy: Tensor, strength: Tensor, noise_sigma: Tensor, piece: Tensor
    ) -> Tensor:
        """Render rows as `render.render_varied` does.

        Parameters
        ----------
        rows, copy
            As in `render`.
        strength : Tensor, shape (n, most blobs of a subframe), float32
            Factor by which the amplitude of each blob is multiplied, in the layout of `by_row`.
        noise_sigma : Tensor, shape (n,), float32
            Standard deviation of the added noise (sigma).
        piece : Tensor, shape (n,), int64
            Index of the piece of clutter over each subframe; -1 for none.

        Returns
        -------
        Tensor, shape (n, 1, 256, 256), float32, on the device
        """
        at = copy * self.noise_seed.shape[1] + rows
        seeds = self.noise_seed.view(-1)[at]
        turns = self.turn.view(-1, 2)[at]
        return self._varied(rows, seeds, turns, strength, noise_sigma, piece)[:, None]

    def _draw(self, rows: Tensor, seeds: Tensor, turns: Tensor, noise_sigma: float) -> Tensor:
        """Draw standardised subframes, shape (n, 256, 256)."""
        y, x = _source(turns)
        image = self._sky(rows, self.factor[rows], y, x)
        image = self._limited(image, rows)
        if noise_sigma > 0:
            image = image + noise_sigma * self._noise(seeds[:, None, None], y * tiles.SIDE + x)
        spread, mean = torch.std_mean(image, (1, 2), correction=0, keepdim=True)
        return torch.where(spread > 1e-6, (image - mean) / spread, 0.0)

    def _draw_varied(
        self,
        rows: Tensor,
        seeds: Tensor,
        turns: Tensor,
        strength: Tensor,
        noise_sigma: Tensor,
        piece: Tensor,
    ) -> Tensor:
        """Draw subframes with clutter, in sigma, shape (n, 256, 256)."""
        y, x = _source(turns)
        image = self._sky(rows, self.factor[rows] * strength, y, x)
        pixel = y * tiles.SIDE + x

        # Clutter, none where the index is negative
        piece = piece[:, None, None]
        over = self.pieces.view(-1)[piece.clamp(min=0) * tiles.SIDE**2 + pixel]
        over = torch.where(piece >= 0, over, torch.zeros_like(over))

        image = image + noise_sigma[:, None, None] * self._noise(seeds[:, None, None], pixel)
        image = self._limited(image + over.float() / clutter.STEP, rows)
        return torch.where(over == clutter.NO_VALUE, 0.0, image)

    def _sky(self, rows: Tensor, factor: Tensor, y: Tensor, x: Tensor) -> Tensor:
        """Return background, dip and blobs of each pixel.

        Parameters
        ----------
        rows : Tensor, shape (n,)
        factor : Tensor, shape (n, most blobs of a subframe)
        y, x : Tensor, shape (n, 256, 256)
            Row and column in the unturned subframe.
        """
        frame = self.frame[rows].long()
        x0, y0 = self.window[rows].long().T[:, :, None, None]
        ny, nx = self.pattern.shape

        background = self.backgrounds.view(-1)[(frame[:, None, None] * ny + y0 + y) * nx + x0 + x]
        image = background.float() / STEP

        # The pattern where it has moved, minus where it is
        dx, dy = self.dip[rows].T[:, :, None, None]
        here = self.pattern.view(-1)[(y0 + y) * nx + x0 + x]
        dip = self._sample(x0 + x, y0 + y, dx, dy) - here
        has_dip = (dx != 0) | (dy != 0)
        image = image + torch.where(has_dip, dip * self.per_frac[frame][:, None, None], 0.0)

        for b in range(self.blob.shape[1]):
            image = image + self._stamp(self.blob[rows, b], factor[:, b], x, y)
        return image

    def _limited(self, image: Tensor, rows: Tensor) -> Tensor:
        """Clip images at the limits of their frames."""
        low, high = self.limits[self.frame[rows].long()].T[:, :, None, None]
        return torch.minimum(torch.maximum(image, low), high)

    def _sample(self, x: Tensor, y: Tensor, dx: Tensor, dy: Tensor) -> Tensor:
        """Return the pattern moved by ``dx``, ``dy``, by bilinear interpolation, zero outside."""
        ny, nx = self.pattern.shape
        left = torch.floor(-dx)
        low = torch.floor(-dy)
        fx = -dx - left
        fy = -dy - low
        x = x + left.long()
        y = y + low.long()
        inside = (x >= 0) & (y >= 0) & (x + 1 < nx) & (y + 1 < ny)
        at = torch.where(inside, y * nx + x, 0)
        flat = self.pattern.view(-1)
        lower = flat[at] * (1 - fx) + flat[at + 1] * fx
        upper = flat[at + nx] * (1 - fx) + flat[at + nx + 1] * fx
        return torch.where(inside, lower * (1 - fy) + upper * fy, 0.0)

    def _stamp(self, blob: Tensor, factor: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Return the light loss of one blob of each subframe; a factor of 0 means none."""
        size = self.stamps.shape[-1]
        number, cx, cy = blob.long().T[:, :, None, None]
        x = x - cx + size // 2
        y = y - cy + size // 2
        factor = factor[:, None, None]
        inside = (x >= 0) & (y >= 0) & (x < size) & (y < size) & (factor != 0)
        at = torch.where(inside, (number * size + y) * size + x, 0)
        return torch.where(inside, factor * self.stamps.view(-1)[at], 0.0)

    def _noise(self, seeds: Tensor, pixel: Tensor) -> Tensor:
        """Return normal deviates, four from each word of SplitMix64."""
        word = mix(seeds + (pixel // 4 + 1) * GOLDEN)
        bits = word >> (16 * (pixel % 4))
        return self.quantiles[bits & (render.N_QUANTILES - 1)]


def keep_mask(shape: tuple[int, ...], dropout: float, seed: Tensor) -> Tensor:
    """Return the results that dropout keeps, as `fused.keep_mask` does, on the device of the seed.

    Parameters
    ----------
    shape : (n, filters, ny, nx)
    dropout : float
        Probability that a result is dropped.
    seed : Tensor, shape (), int64

    Returns
    -------
    Tensor of ``shape``, bool
    """
    images = torch.arange(shape[0], device=seed.device)
    at = torch.arange(int(np.prod(shape[1:])), device=seed.device)
    keys = mix(seed + images * IMAGE_STEP)
    words = mix(keys[:, None] + at * GOLDEN)
    # Unsigned numbers are compared as signed ones that are lower by 2^63
    threshold = int(dropout * 2**64) - 2**63
    return (words ^ -(2**63) >= threshold).view(shape)


def mix(word: Tensor) -> Tensor:
    """Mix the bits of a counter as `random_streams.mix` does, the same function, on int64.

    PyTorch shifts the sign in from the left, so these bits are masked.
    """
    word = (word ^ ((word >> 30) & (2**34 - 1))) * FACTORS[0]
    word = (word ^ ((word >> 27) & (2**37 - 1))) * FACTORS[1]
    return word ^ ((word >> 31) & (2**33 - 1))


def _source(turns: Tensor) -> tuple[Tensor, Tensor]:
    """Return the row and column of the unturned subframe for each pixel of the turned one.

    Parameters
    ----------
    turns : Tensor, shape (n, 2)
        Quarter turns and flip of each subframe.

    Returns
    -------
    rows, columns : Tensor, shape (n, 256, 256), int64
    """
    last = tiles.SIDE - 1
    side = torch.arange(tiles.SIDE, device=turns.device)
    quarters, flip = turns.long().T[:, :, None, None]
    y = side[:, None]
    x = torch.where(flip != 0, last - side, side)
    # Three quarter turns, unless there are two, one or none
    rows = torch.where(quarters == 2, last - y, last - x)
    rows = torch.where(quarters == 1, x, rows)
    rows = torch.where(quarters == 0, y, rows)
    columns = torch.where(quarters == 2, last - x, y)
    columns = torch.where(quarters == 1, last - y, columns)
    columns = torch.where(quarters == 0, x, columns)
    return rows, columns


def by_row(recipes: Recipes, of_blobs: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return what is known of each blob in rows of one length, filled up with zeros.

    Parameters
    ----------
    recipes : Recipes
    of_blobs : ndarray, shape (m, ...)
        A value, or some, of each blob.

    Returns
    -------
    ndarray, shape (n, most blobs of a subframe, ...)
    """
    counts = np.diff(recipes.first_blob)
    most = max(1, int(counts.max(initial=0)))
    rows = np.zeros((len(recipes), most, *of_blobs.shape[1:]), of_blobs.dtype)
    rows[np.arange(most) < counts[:, None]] = of_blobs
    return rows


class Recorded:
    """A function of CUDA tensors that is recorded as a graph after a few calls, and replayed from then on.

    Parameters
    ----------
    work : callable
        Takes CUDA tensors and returns one.

    Notes
    -----
    For inputs of other shapes than those of the first call, the function itself is called.
    """

    # Calls before recording, in which the libraries choose their algorithms and allocate their memory
    N_FIRST = 3

    def __init__(self, work: Callable[..., Tensor]) -> None:
        self.work = work
        self.n = 0
        self.inputs: list[Tensor] = []
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Return the result, which the next call overwrites."""
        if not self.inputs:
            self.inputs = [value.cuda() for value in inputs]
        if any(value.shape != kept.shape for value, kept in zip(inputs, self.inputs, strict=True)):
            return self.work(*(value.cuda() for value in inputs))
        for value, kept in zip(inputs, self.inputs, strict=True):
            kept.copy_(value)
        self.n += 1
        if self.n <= self.N_FIRST:
            return self._on_side_stream()
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.result = self.work(*self.inputs)
        self.graph.replay()
        return self.result

    def _on_side_stream(self) -> Tensor:
        """Call the function on a stream of its own, as recording requires."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            result = self.work(*self.inputs)
        torch.cuda.current_stream().wait_stream(side)
        return result
