"""Rendering on a GPU, from data that lie in its memory: a batch is made where it is used.

The same recipes give the same pixels as `render.render_subframes`, up to rounding: here every pixel of the batch asks for its
background, its dip, its blobs and its noise at once, so that a compiler makes a few kernels of it all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from blobpipe.images import tiles
from blobpipe.simulation import clutter, render
from blobpipe.simulation.recipes import STEP, Recipes, Scene

if TYPE_CHECKING:
    import numpy.typing as npt

# as signed 64-bit integers, the only ones that PyTorch computes with
GOLDEN = 0x9E3779B97F4A7C15 - 2**64
FACTORS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
IMAGE_STEP = 0xD1B54A32D192ED03 - 2**64


class Renderer:
    """Recipes and their scene in a device's memory.

    Parameters
    ----------
    scene : render.Scene
    recipes : render.Recipes
    device : torch.device
    pieces : ndarray, shape (m, 256, 256), int16, optional
        Clutter for `vary`, from `clutter.draw_pieces`.
    """

    def __init__(
        self,
        scene: Scene,
        recipes: Recipes,
        device: torch.device,
        pieces: npt.NDArray[np.int16] | None = None,
    ) -> None:
        def put(array: npt.NDArray[np.generic]) -> Tensor:
            # a copy: some cannot be written to
            return torch.tensor(np.ascontiguousarray(array), device=device)

        self.backgrounds, self.limits = put(scene.backgrounds), put(scene.limits)
        self.per_frac, self.pattern, self.stamps = (
            put(1 / scene.sigma_frac),
            put(scene.pattern),
            put(scene.stamps),
        )
        self.frame, self.window, self.dip = (
            put(recipes.frame),
            put(recipes.window),
            put(recipes.dip),
        )
        self.label = put(recipes.label)
        self.place(recipes)
        self.noise_seed, self.turn = put(recipes.noise_seed.view(np.int64)), put(recipes.turn)
        self.copies = len(recipes.noise_seed)
        self.quantiles = put(render.NORMAL_QUANTILES)
        self.pieces = put(
            np.zeros((1, tiles.SIDE, tiles.SIDE), np.int16) if pieces is None else pieces
        )
        compiled = device.type == "cuda"
        self._pixels = torch.compile(self._draw, dynamic=False) if compiled else self._draw
        self._varied = (
            torch.compile(self._draw_varied, dynamic=False) if compiled else self._draw_varied
        )

    def place(self, recipes: Recipes) -> None:
        """Take the blobs of these recipes from now on, which are the first ones but for their stamps and factors."""
        blob = by_row(recipes, recipes.blob)
        factor = by_row(recipes, recipes.factor)
        self.blob, self.factor = (
            torch.from_numpy(array).to(self.label.device) for array in (blob, factor)
        )

    def render(self, rows: Tensor, copy: Tensor, noise_sigma: float = 0.0) -> Tensor:
        """What `render.render_subframes` gives, as a Tensor of shape (n, 1, 256, 256) on the device.

        Parameters
        ----------
        rows : Tensor, shape (n,), int64, on the device
        copy : Tensor, shape (), int64, on the device
            Which of the augmented copies, below `copies`.
        noise_sigma
            As there.
        """
        at = copy * self.noise_seed.shape[1] + rows
        return self._pixels(
            rows, self.noise_seed.view(-1)[at], self.turn.view(-1, 2)[at], noise_sigma
        )[:, None]

    def vary(
        self, rows: Tensor, copy: Tensor, strength: Tensor, noise_sigma: Tensor, piece: Tensor
    ) -> Tensor:
        """What `render.render_varied` gives, as a Tensor of shape (n, 1, 256, 256) on the device.

        Parameters
        ----------
        rows, copy
            As in `render`.
        strength : Tensor, shape (n, most blobs of a subframe), float32
        noise_sigma : Tensor, shape (n,), float32
        piece : Tensor, shape (n,), int64
        """
        at = copy * self.noise_seed.shape[1] + rows
        seeds = self.noise_seed.view(-1)[at]
        turns = self.turn.view(-1, 2)[at]
        return self._varied(rows, seeds, turns, strength, noise_sigma, piece)[:, None]

    def _draw(self, rows: Tensor, seeds: Tensor, turns: Tensor, noise_sigma: float) -> Tensor:
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
        y, x = _source(turns)
        image = self._sky(rows, self.factor[rows] * strength, y, x)
        pixel = y * tiles.SIDE + x
        over = self.pieces.view(-1)[piece.clamp(min=0)[:, None, None] * tiles.SIDE**2 + pixel]
        over = torch.where((piece >= 0)[:, None, None], over, torch.zeros_like(over))
        image = image + noise_sigma[:, None, None] * self._noise(seeds[:, None, None], pixel)
        image = self._limited(image + over.float() / clutter.STEP, rows)
        return torch.where(over == clutter.NO_VALUE, 0.0, image)

    def _sky(self, rows: Tensor, factor: Tensor, y: Tensor, x: Tensor) -> Tensor:
        """Background, dip and blobs."""
        frame = self.frame[rows].long()
        x0, y0 = self.window[rows].long().T[:, :, None, None]
        ny, nx = self.pattern.shape
        image = (
            self.backgrounds.view(-1)[(frame[:, None, None] * ny + y0 + y) * nx + x0 + x].float()
            / STEP
        )
        dx, dy = self.dip[rows].T[:, :, None, None]
        moved = self._sample(x0 + x, y0 + y, dx, dy) - self.pattern.view(-1)[(y0 + y) * nx + x0 + x]
        image = image + torch.where(
            (dx != 0) | (dy != 0), moved * self.per_frac[frame][:, None, None], 0.0
        )
        for b in range(self.blob.shape[1]):
            image = image + self._stamp(self.blob[rows, b], factor[:, b], x, y)
        return image

    def _limited(self, image: Tensor, rows: Tensor) -> Tensor:
        low, high = self.limits[self.frame[rows].long()].T[:, :, None, None]
        return torch.minimum(torch.maximum(image, low), high)

    def _sample(self, x: Tensor, y: Tensor, dx: Tensor, dy: Tensor) -> Tensor:
        """The pattern, moved; bilinear, zero outside."""
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
        size = self.stamps.shape[-1]
        number, cx, cy = blob.long().T[:, :, None, None]
        x = x - cx + size // 2
        y = y - cy + size // 2
        inside = (x >= 0) & (y >= 0) & (x < size) & (y < size) & (factor[:, None, None] != 0)
        at = torch.where(inside, (number * size + y) * size + x, 0)
        return torch.where(inside, factor[:, None, None] * self.stamps.view(-1)[at], 0.0)

    def _noise(self, seeds: Tensor, pixel: Tensor) -> Tensor:
        """Four normal deviates from each word of SplitMix64."""
        word = _mix(seeds + (pixel // 4 + 1) * GOLDEN)
        return self.quantiles[(word >> (16 * (pixel % 4))) & (render.N_QUANTILES - 1)]


def keep_mask(shape: tuple[int, ...], dropout: float, seed: Tensor) -> Tensor:
    """The same as `fused.keep_mask`, on the device of the seed.

    Parameters
    ----------
    shape : (n, filters, ny, nx)
    dropout : float
    seed : Tensor, shape (), int64
    """
    images, at = (torch.arange(n, device=seed.device) for n in (shape[0], int(np.prod(shape[1:]))))
    keys = _mix(seed + images * IMAGE_STEP)
    threshold = int(dropout * 2**64) - 2**63
    return (_mix(keys[:, None] + at * GOLDEN) ^ -(2**63) >= threshold).view(shape)


def _mix(word: Tensor) -> Tensor:
    """The last step of SplitMix64; PyTorch shifts the sign in from the left, so it is masked away."""
    word = (word ^ ((word >> 30) & (2**34 - 1))) * FACTORS[0]
    word = (word ^ ((word >> 27) & (2**37 - 1))) * FACTORS[1]
    return word ^ ((word >> 31) & (2**33 - 1))


def _source(turns: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of the unturned subframe for each pixel of the turned one, both of shape (n, 256, 256)."""
    last = tiles.SIDE - 1
    side = torch.arange(tiles.SIDE, device=turns.device)
    quarters, flip = turns.long().T[:, :, None, None]
    y = side[:, None]
    x = torch.where(flip != 0, last - side, side)
    rows = torch.where(
        quarters == 0,
        y,
        torch.where(quarters == 1, x, torch.where(quarters == 2, last - y, last - x)),
    )
    columns = torch.where(
        quarters == 0,
        x,
        torch.where(quarters == 1, last - y, torch.where(quarters == 2, last - x, y)),
    )
    return rows, columns


def by_row(recipes: Recipes, of_blobs: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """What is known of each blob, in rows: as many for every subframe, zeros for those that are not there."""
    counts = np.diff(recipes.first_blob)
    most = max(1, int(counts.max(initial=0)))
    rows = np.zeros((len(recipes), most, *of_blobs.shape[1:]), of_blobs.dtype)
    rows[np.arange(most) < counts[:, None]] = of_blobs
    return rows


class Recorded:
    """Work on CUDA tensors that runs a few times as it is, is then recorded as a graph, and replayed from there on.

    Parameters
    ----------
    work : callable
        Takes CUDA tensors and returns one.

    Notes
    -----
    Inputs of another shape than the first ones are worked on as they are.
    """

    N_FIRST = 3  # in which the libraries choose their algorithms and take their memory

    def __init__(self, work: Callable[..., Tensor]) -> None:
        self.work, self.n = work, 0
        self.inputs: list[Tensor] = []
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The result; it is overwritten by the next call."""
        if not self.inputs:
            self.inputs = [value.cuda() for value in inputs]
        if any(value.shape != kept.shape for value, kept in zip(inputs, self.inputs, strict=True)):
            return self.work(*(value.cuda() for value in inputs))
        for value, kept in zip(inputs, self.inputs, strict=True):
            kept.copy_(value)
        self.n += 1
        if self.n <= self.N_FIRST:
            return self._aside()
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.result = self.work(*self.inputs)
        self.graph.replay()
        return self.result

    def _aside(self) -> Tensor:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            result = self.work(*self.inputs)
        torch.cuda.current_stream().wait_stream(side)
        return result
