"""Classes that are merged, renamed or ignored when label maps are read."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from maskmatch_scale.data.faults import BadSample
from maskmatch_scale.data.images.decode import decode_label
from maskmatch_scale.data.images.encode import encode_label
from maskmatch_scale.data.images.remap import remap_classes

CLASSES = ("road", "car", "sky", "truck", "bus")
PALETTE = tuple((10 * n, n, 0) for n in range(5))


def test_merged_classes_stand_where_the_first_of_them_stood():
    made = remap_classes(CLASSES, PALETTE, 255, {"car": "vehicle", "truck": "vehicle", "sky": "ignore"})
    assert made.classes == ("road", "vehicle", "bus")
    assert made.palette == (PALETTE[0], PALETTE[1], PALETTE[4])
    assert list(made.table[:5]) == [0, 1, 255, 1, 2]
    assert made.table[255] == 255
    assert made.sums((1, 10, 100, 1000, 10000, 7)) == (1, 1010, 10000, 107)


@pytest.mark.parametrize(
    ("remap", "classes", "table"),
    [
        ({"bus": "car"}, ("road", "car", "sky", "truck"), [0, 1, 2, 3, 1]),  # into a class that stays
        ({"road": "bus"}, ("bus", "car", "sky", "truck"), [0, 1, 2, 3, 0]),  # that stands later
        ({"sky": "air"}, ("road", "car", "air", "truck", "bus"), [0, 1, 2, 3, 4]),
        ({"car": "car", "bus": "car"}, ("road", "car", "sky", "truck"), [0, 1, 2, 3, 1]),
    ],
)
def test_targets_may_be_classes_that_stay(remap, classes, table):
    made = remap_classes(CLASSES, PALETTE, 255, remap)
    assert (made.classes, list(made.table[:5])) == (classes, table)


def test_a_class_that_is_called_ignore_is_a_class_until_it_is_remapped():
    names = ("a", "b", "ignore")
    assert remap_classes(names, PALETTE[:3], 255, {"a": "c"}).classes == ("c", "b", "ignore")
    assert remap_classes(names, PALETTE[:3], 255, {"ignore": "ignore"}).classes == ("a", "b")


@pytest.mark.parametrize(
    ("remap", "said"),
    [
        ({"trukc": "car"}, r"no class 'trukc'; did you mean truck\?"),
        ({"xyz": "car"}, r"no class 'xyz'; it has road, car, sky, truck, bus"),
        ({"car": "truck", "truck": "bus"}, r"car: truck, but truck: bus: chains are not followed; write car: bus"),
        ({"car": "truck", "truck": "ignore"}, r"car: truck, but truck: ignore: chains"),
        (dict.fromkeys(CLASSES, "one"), r"leaves only 'one' of 5 classes; at least 2"),
        (dict.fromkeys(CLASSES, "ignore"), r"leaves no class of 5"),
        ({"car": " "}, r"'car': ' ': a class needs a name"),
    ],
)
def test_what_cannot_be_meant_is_refused(remap, said):
    with pytest.raises(ValueError, match=said):
        remap_classes(CLASSES, PALETTE, 255, remap)


def test_another_index_may_lack_names():
    made = remap_classes(("road", "vehicle"), PALETTE[:2], 255, {"car": "vehicle", "sky": "ignore"}, strict=False)
    assert (made.classes, list(made.table[:2])) == (("road", "vehicle"), [0, 1])


@st.composite
def _cases(draw):
    count = draw(st.integers(3, 40))
    names = [f"c{n}" for n in range(count)]
    targets = st.sampled_from([f"n{n}" for n in range(4)] + ["ignore"])
    remapped = draw(st.lists(st.sampled_from(names[2:]), unique=True))
    remap = {name: draw(targets) for name in remapped}
    seed, bits_16 = draw(st.integers(0, 2**32 - 1)), draw(st.booleans())
    return names, remap, seed, bits_16


@given(_cases())
def test_a_decoded_label_map_is_the_stored_one_looked_up_by_name(case):
    names, remap, seed, bits_16 = case
    made = remap_classes(names, [(0, 0, 0)] * len(names), 200, remap)
    draw = np.random.default_rng(seed)
    stored = draw.choice([*range(len(names)), 200], size=(5, 7)).astype(np.uint8)
    data = encode_label(stored)
    if bits_16:  # 65535 is ignored
        buffer = io.BytesIO()
        Image.fromarray(np.where(stored == 200, np.uint16(65535), stored.astype(np.uint16))).save(buffer, "PNG")
        data = buffer.getvalue()
    found = decode_label(data, "x", ignore_index=200, remap=made).numpy()
    for value, new in zip(stored.ravel().tolist(), found.ravel().tolist(), strict=True):
        target = "ignore" if value == 200 else remap.get(names[value], names[value])
        assert ("ignore" if new == 200 else made.classes[new]) == target
    pixels = np.bincount(stored.ravel(), minlength=256)
    of_stored = (*pixels[: len(names)].tolist(), int(pixels[200]))
    after = np.bincount(found.ravel(), minlength=256)
    assert made.sums(of_stored) == (*after[: len(made.classes)].tolist(), int(after[200]))


def test_a_stored_value_that_is_no_class_is_bad_whatever_the_model_holds():
    made = remap_classes(CLASSES, PALETTE, 255, {"car": "bus"})
    with pytest.raises(BadSample, match="label value 5, but there are 5 classes"):
        decode_label(encode_label(np.full((2, 2), 5, np.uint8)), "x", num_classes=9, remap=made)
