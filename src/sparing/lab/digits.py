"""Scenes to ask about: four handwritten digits, one of each colour, on a photograph.

Everything comes with scikit-learn: the 1,797 handwritten digits of `load_digits` and the two photographs of
`load_sample_images`. A scene is a 96 x 96 crop of a photograph on which four digits stand, one red, one green, one
blue, one yellow; the question is which digit has a given colour. The answer to a question lies in at most 25 of the 256
patches, and which patches these are is known, so a method that selects visual tokens can be held against an oracle.

A scene depends only on `(split, seed, index)`. The two splits share no digit image and no pixel of a photograph.

>>> first = scene("test", 0)
>>> first.image.shape, len(first.digits), int(first.oracle("red").sum()) <= 25
((96, 96, 3), 4, True)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import affine_transform
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor

SPLITS = ("train", "test")
COLOURS = ("red", "green", "blue", "yellow")
TINTS = np.array([(235, 55, 45), (50, 205, 70), (70, 110, 255), (245, 220, 60)], np.float32)

CANVAS = 96  #: side of a scene, pixels
PATCH = 6  #: side of a patch, pixels
GRID = CANVAS // PATCH  #: patches along a side
PATCHES = GRID * GRID  #: patches of a scene, in raster order: the visual tokens
GLYPH = 24  #: side of an enlarged digit, pixels
CELL = -(-(GLYPH + PATCH - 1) // PATCH)  #: patches along a side that a digit at any offset can touch

NO_DIGIT = 10  #: patch label: no digit here
NO_COLOUR = len(COLOURS)  #: patch label: no coloured digit here

VOCABULARY = ("<pad>", "<bos>", "<eos>", "<unk>", "<image>", *COLOURS, *"0123456789")
TOKEN = {word: index for index, word in enumerate(VOCABULARY)}

_TEST_EVERY = 5  # every fifth image of a digit is held out
_TEST_COLUMNS = 192  # the right edge of the photographs is held out, pixels
_DIM = 0.5  # brightness of the photographs, so that no digit drowns in them


@dataclass(frozen=True)
class Scene:
    """One picture with its four digits.

    Attributes:
        image: (96, 96, 3) uint8, RGB.
        digits: the digit of each colour, in the order of `COLOURS`.
        boxes: (left, top) pixel of the digit of each colour; a digit's box is 24 x 24 pixels.
    """

    image: NDArray[np.uint8]
    digits: tuple[int, ...]
    boxes: tuple[tuple[int, int], ...]

    def answer(self, colour: str) -> str:
        """The digit of that colour, as the word the model has to say."""
        return str(self.digits[_colour(colour)])

    def prompt(self, colour: str) -> str:
        """The question as text for the processor, which puts 256 image tokens in the place of `<image>`."""
        _colour(colour)
        return f"<image> {colour}"

    def prompt_ids(self, colour: str) -> Tensor:
        """The question as (258,) int64 token ids: `<bos>`, 256 x `<image>`, the colour."""
        _colour(colour)
        return torch.tensor([TOKEN["<bos>"], *[TOKEN["<image>"]] * PATCHES, TOKEN[colour]])

    def oracle(self, colour: str) -> Tensor:
        """(256,) bool: the 16 to 25 patches that the box of the digit of that colour touches."""
        left, top = self.boxes[_colour(colour)]
        mask = torch.zeros(GRID, GRID, dtype=torch.bool)
        mask[top // PATCH : -(-(top + GLYPH) // PATCH), left // PATCH : -(-(left + GLYPH) // PATCH)] = True
        return mask.flatten()

    def patch_digits(self) -> Tensor:
        """(256,) int64: the digit whose box touches the patch, else `NO_DIGIT`."""
        return self._label(self.digits, NO_DIGIT)

    def patch_colours(self) -> Tensor:
        """(256,) int64: the colour, as an index into `COLOURS`, whose box touches the patch, else `NO_COLOUR`."""
        return self._label(range(NO_COLOUR), NO_COLOUR)

    def _label(self, values: range | tuple[int, ...], background: int) -> Tensor:
        label = torch.full((PATCHES,), background)
        for colour, value in zip(COLOURS, values, strict=True):
            label[self.oracle(colour)] = value
        return label


def scene(split: str, index: int, seed: int = 0) -> Scene:
    """The scene number `index` of a split; for training the digits are distorted a little, for testing they are not."""
    if split not in SPLITS:
        raise ValueError(f"split: {split!r} is none of {', '.join(SPLITS)}")
    rng = np.random.default_rng((SPLITS.index(split), seed, index))
    image = _crop(split, rng).astype(np.float32) * _DIM
    glyphs, labels = _glyphs(split)
    chosen = rng.integers(len(glyphs), size=len(COLOURS))
    boxes = _layout(rng)
    for pick, (left, top), tint in zip(chosen, boxes, TINTS, strict=True):
        ink = _draw(glyphs[pick], rng if split == "train" else None)[..., None]
        region = image[top : top + GLYPH, left : left + GLYPH]
        region += ink * (tint - region)
    return Scene(image.round().astype(np.uint8), tuple(int(labels[pick]) for pick in chosen), boxes)


def scenes(split: str, n: int, seed: int = 0, start: int = 0) -> list[Scene]:
    """Scenes `start` to `start + n` of a split, always the same ones for the same arguments."""
    return [scene(split, index, seed) for index in range(start, start + n)]


def rows(split: str) -> NDArray[np.intp]:
    """The rows of `load_digits` that a split draws from: every fifth image of each digit is for testing."""
    target = load_digits().target
    rank = np.empty_like(target)
    for digit in range(10):
        same = np.flatnonzero(target == digit)
        rank[same] = np.arange(len(same))
    return np.flatnonzero((rank % _TEST_EVERY == 0) == (split == "test"))


def _colour(name: str) -> int:
    if name not in COLOURS:
        raise ValueError(f"colour: {name!r} is none of {', '.join(COLOURS)}")
    return COLOURS.index(name)


@cache
def _glyphs(split: str) -> tuple[NDArray[np.float32], NDArray[np.intp]]:
    """The digits of a split: (N, 8, 8) ink in 0..1, and (N,) labels."""
    data, own = load_digits(), rows(split)
    return (data.images[own] / 16).astype(np.float32), data.target[own]


@cache
def _photographs(split: str) -> tuple[NDArray[np.uint8], ...]:
    columns = slice(-_TEST_COLUMNS, None) if split == "test" else slice(None, -_TEST_COLUMNS)
    return tuple(photograph[:, columns] for photograph in load_sample_images().images)


def _crop(split: str, rng: np.random.Generator) -> NDArray[np.uint8]:
    photographs = _photographs(split)
    photograph = photographs[rng.integers(len(photographs))]
    top, left = rng.integers(np.array(photograph.shape[:2]) - CANVAS + 1)
    crop = photograph[top : top + CANVAS, left : left + CANVAS]
    return crop[:, ::-1] if rng.random() < 0.5 else crop


def _layout(rng: np.random.Generator) -> tuple[tuple[int, int], ...]:
    """(left, top) of four digits, no patch touched by two: four separate cells of 5 x 5 patches, an offset in each."""
    while True:
        corners = rng.integers(GRID - CELL + 1, size=(64, len(COLOURS), 2))
        distance = np.abs(corners[:, :, None] - corners[:, None]).max(-1) + CELL * np.eye(len(COLOURS), dtype=int)
        free = np.flatnonzero((distance >= CELL).all((1, 2)))
        if len(free):
            offsets = rng.integers(CELL * PATCH - GLYPH + 1, size=(len(COLOURS), 2))
            return tuple((int(x), int(y)) for x, y in corners[free[0]] * PATCH + offsets)


def _draw(glyph: NDArray[np.float32], rng: np.random.Generator | None) -> NDArray[np.float32]:
    """A digit of 8 x 8 as 24 x 24 ink in 0..1; with `rng` turned, scaled, sheared, moved and paled by a little."""
    linear, shift, strength = np.eye(2), np.zeros(2), 1.0
    if rng is not None:
        angle, shear = rng.uniform(-0.26, 0.26), rng.uniform(-0.2, 0.2)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        linear = turn @ np.array([[1, shear], [0, 1]]) @ np.diag(rng.uniform(0.88, 1.14, 2))
        shift, strength = rng.uniform(-0.5, 0.5, 2), rng.uniform(0.75, 1.0)
    linear = linear * (len(glyph) / GLYPH)
    centre = (len(glyph) - 1) / 2
    offset = centre + shift - linear @ np.full(2, (GLYPH - 1) / 2)
    return strength * affine_transform(glyph, linear, offset, (GLYPH, GLYPH), order=1)
