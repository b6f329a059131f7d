"""The world of `lab:vlm`: the same scenes every time, splits that share nothing, labels and oracle that agree."""

import numpy as np
import pytest
import torch

from sparing.lab import digits
from sparing.lab.digits import (
    COLOURS,
    GLYPH,
    GRID,
    NO_COLOUR,
    NO_DIGIT,
    PATCH,
    PATCHES,
    TINTS,
    TOKEN,
    rows,
    scene,
    scenes,
)


@pytest.fixture(scope="module")
def some() -> list[digits.Scene]:
    return scenes("train", 60) + scenes("test", 60)


def test_a_scene_depends_on_split_seed_and_index_only():
    again = scenes("test", 3, seed=5, start=2)
    for index, one in enumerate(again, start=2):
        alone = scene("test", index, seed=5)
        assert np.array_equal(one.image, alone.image)
        assert (one.digits, one.boxes) == (alone.digits, alone.boxes)
    assert not np.array_equal(scene("test", 2, seed=6).image, again[0].image)
    assert not np.array_equal(scene("train", 2, seed=5).image, again[0].image)


def test_splits_share_no_digit_and_no_pixel():
    train, test = rows("train"), rows("test")
    assert not set(train) & set(test)
    assert len(train) + len(test) == 1797
    labels = digits._glyphs("test")[1]
    assert min(np.bincount(labels, minlength=10)) >= 30
    for left, right in zip(digits._photographs("train"), digits._photographs("test"), strict=True):
        assert left.shape[1] + right.shape[1] == 640
        assert not np.shares_memory(left, right)


def test_all_digits_stand_in_all_colours(some):
    assert {(c, d) for s in some for c, d in enumerate(s.digits)} == {(c, d) for c in range(4) for d in range(10)}


def test_boxes_stay_inside_and_touch_no_patch_twice(some):
    for s in some:
        assert all(0 <= x <= digits.CANVAS - GLYPH for box in s.boxes for x in box)
        touched = torch.stack([s.oracle(c) for c in COLOURS]).sum(0)
        assert touched.max() == 1


def test_oracle_covers_its_digit_and_stays_within_a_tenth(some):
    for s in some:
        for colour, (left, top) in zip(COLOURS, s.boxes, strict=True):
            mask = s.oracle(colour)
            assert mask.shape == (PATCHES,) and mask.dtype == torch.bool
            assert 16 <= mask.sum() <= 25 < PATCHES / 10
            pixels = mask.view(GRID, GRID).repeat_interleave(PATCH, 0).repeat_interleave(PATCH, 1)
            assert pixels[top : top + GLYPH, left : left + GLYPH].all()
            # no whole row or column of patches beside the box
            assert pixels.any(0).sum() < GLYPH + 2 * PATCH and pixels.any(1).sum() < GLYPH + 2 * PATCH


def test_oracle_of_a_scene_by_hand():
    s = digits.Scene(np.zeros((96, 96, 3), np.uint8), (1, 2, 3, 4), ((0, 0), (31, 6), (0, 66), (72, 72)))
    patches = [row * 16 + column for row in range(1, 5) for column in range(5, 10)]
    assert s.oracle("green").nonzero().flatten().tolist() == patches
    assert s.answer("green") == "2"
    assert set(s.patch_digits()[patches].tolist()) == {2}
    assert set(s.patch_colours()[patches].tolist()) == {1}


def test_patch_labels_agree_with_digits_and_boxes(some):
    for s in some:
        digit, colour = s.patch_digits(), s.patch_colours()
        for index, name in enumerate(COLOURS):
            assert torch.equal(colour == index, s.oracle(name))
            assert (digit[s.oracle(name)] == int(s.answer(name))).all()
        assert torch.equal(digit == NO_DIGIT, colour == NO_COLOUR)


def test_ink_has_the_colour_and_everything_else_is_photograph():
    s = scene("test", 0)
    for colour, (left, top) in enumerate(s.boxes):
        region = s.image[top : top + GLYPH, left : left + GLYPH].astype(float)
        assert np.abs(region - TINTS[colour]).max(-1).min() < 12


def test_prompt():
    ids = scene("test", 0).prompt_ids("blue")
    assert ids.tolist() == [TOKEN["<bos>"], *[TOKEN["<image>"]] * 256, TOKEN["blue"]]


@pytest.mark.parametrize(
    "call", [lambda: scene("valid", 0), lambda: scene("test", 0).oracle("pink"), lambda: scene("test", 0).prompt("9")]
)
def test_wrong_names_are_refused(call):
    with pytest.raises(ValueError, match="is none of"):
        call()
