"""Pixels against Pillow, format by format, and what must be refused before it is decoded."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image, ImageOps

from maskmatch_scale.data.faults import BadSample
from maskmatch_scale.data.images import image as images
from maskmatch_scale.data.images.decode import decode_image, decode_label
from maskmatch_scale.data.images.label import decode_raw_values, is_8_bit_grey_png
from tests.data.bad_shards import encode, png_header

RANDOM = np.random.default_rng(0)
Y, X = np.mgrid[:45, :67]
PIXELS = (np.stack([X * 3, Y * 5, X + Y], -1) + RANDOM.integers(0, 40, (45, 67, 3))).clip(0, 255).astype(np.uint8)
PICTURE = Image.fromarray(PIXELS)
LABELS = RANDOM.integers(0, 4, (6, 13), dtype=np.uint8)


def by_pillow(data):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


def png(values, bits, colour=0, palette=b""):
    """A PNG written out by hand: rows of `values` packed into `bits` a channel."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = values.reshape(len(values), -1)
    if bits == 16:
        packed = [row.astype(">u2").tobytes() for row in rows]
    else:
        spread = (rows[..., None] >> np.arange(bits - 1, -1, -1)) & 1
        packed = [np.packbits(row).tobytes() for row in spread.reshape(len(rows), -1).astype(np.uint8)]
    body = zlib.compress(b"".join(b"\0" + row for row in packed))
    size = struct.pack(">IIBBBBB", values.shape[1], len(values), bits, colour, 0, 0, 0)
    parts = [
        chunk(b"IHDR", size),
        chunk(b"PLTE", palette) if palette else b"",
        chunk(b"IDAT", body),
        chunk(b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def with_exif(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def ycck():
    # Pillow writes CMYK with Adobe's transform 0; 2 says YCCK.
    data = bytearray(encode(PICTURE.convert("CMYK"), "JPEG", quality=95))
    data[data.index(b"Adobe") + 11] = 2
    return bytes(data)


GREY_ALPHA = PICTURE.convert("LA")
FORMATS = {
    **{f"jpeg {name}": encode(PICTURE, "JPEG", quality=90, subsampling=name) for name in ("4:4:4", "4:2:2", "4:2:0")},
    **{f"jpeg {name}": simplejpeg.encode_jpeg(PIXELS, colorsubsampling=name) for name in ("440", "411")},
    "jpeg progressive": encode(PICTURE, "JPEG", progressive=True),
    "jpeg grey": encode(PICTURE.convert("L"), "JPEG"),
    "jpeg cmyk": encode(PICTURE.convert("CMYK"), "JPEG"),
    "jpeg ycck": ycck(),
    "jpeg restarts": encode(PICTURE, "JPEG", restart_marker_blocks=2),
    "jpeg rgb": encode(PICTURE, "JPEG", keep_rgb=True),
    "jpeg trailing bytes": encode(PICTURE, "JPEG") + b"more",
    "jpeg one pixel": encode(PICTURE.crop((0, 0, 1, 1)), "JPEG"),
    "png rgb": encode(PICTURE, "PNG"),
    "png grey": encode(PICTURE.convert("L"), "PNG"),
    "png one bit": encode(PICTURE.convert("1"), "PNG"),
    "png two bits": png(LABELS, 2),
    "png four bits": png(LABELS * 5, 4),
    "png palette": encode(PICTURE.convert("P", palette=Image.Palette.ADAPTIVE), "PNG"),
    "png palette of transparencies": encode(PICTURE.quantize(9), "PNG", transparency=bytes(range(9))),
    "png palette of one transparency": encode(PICTURE.quantize(9), "PNG", transparency=3),
    "png transparent colour": encode(PICTURE, "PNG", transparency=(1, 2, 3)),
    "png grey alpha": encode(GREY_ALPHA, "PNG"),
    "png rgb alpha": encode(PICTURE.convert("RGBA"), "PNG"),
    "png 16-bit rgb": png(PIXELS.astype(np.uint16) * 257, 16, colour=2),
    "png 16-bit grey alpha": png(PIXELS[..., :2].astype(np.uint16) * 257, 16, colour=4),
    "webp": encode(PICTURE, "WEBP"),
    "webp lossless": encode(PICTURE, "WEBP", lossless=True),
    "webp alpha": encode(PICTURE.convert("RGBA"), "WEBP"),
    "webp animated": encode(PICTURE, "WEBP", save_all=True, append_images=[PICTURE.rotate(90)]),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.filterwarnings("error")
def test_pixels_are_pillows(name, contiguous):
    image = decode_image(FORMATS[name], "x", contiguous=contiguous)
    assert image.dtype == torch.uint8
    assert image.is_contiguous() or not contiguous
    assert np.array_equal(image.permute(1, 2, 0), by_pillow(FORMATS[name]))
    image += 1  # memory of its own, and writable


@pytest.mark.parametrize("bits", [8, 10, 12])
@pytest.mark.parametrize("colour", [0, 2, 4, 6])
def test_fewer_bits_in_16_are_refused_and_not_black(bits, colour):
    """As cameras and scanners write them: without scaling."""
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    values = RANDOM.integers(0, 2**bits, (5, 7, channels)).astype(np.uint16)
    if colour in (4, 6):
        values[..., -1] = 65535  # opaque
    if colour == 4 and bits == 8:
        pytest.skip("Pillow does not give the lower bytes of grey with alpha")
    with pytest.raises(BadSample, match=r"no value above 4095 of 65535.*12-bit.*scale") as caught:
        decode_image(png(values, 16, colour=colour), "x")
    assert caught.value.reason == "not_an_image"


@pytest.mark.parametrize("colour", [0, 2, 4, 6])
def test_black_and_dark_images_of_16_bits_are_used(colour):
    values = np.zeros((5, 7, {0: 1, 2: 3, 4: 2, 6: 4}[colour]), np.uint16)
    assert decode_image(png(values, 16, colour=colour), "x").max() == 0
    values[2, 3] = 4096
    assert decode_image(png(values, 16, colour=colour), "x").max() == 16


def test_16_bit_grey_keeps_its_upper_8():
    values = RANDOM.integers(0, 2**16, (5, 7)).astype(np.uint16)
    image = decode_image(png(values, 16), "x")
    assert np.array_equal(image, np.stack([values >> 8] * 3))


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_lossless_images_come_back_as_they_were(kind):
    image = decode_image(encode(PIXELS, kind, lossless=True), "x")
    assert np.array_equal(image.permute(1, 2, 0), PIXELS)


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_followed_when_asked_for(kind, orientation):
    data = encode(PICTURE, kind, exif=with_exif(orientation))
    assert np.array_equal(decode_image(data, "x").permute(1, 2, 0), by_pillow(data))
    turned = decode_image(data, "x", exif_orientation=True)
    if orientation in range(1, 9):
        assert np.array_equal(
            turned.permute(1, 2, 0), ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
        )
    else:
        assert np.array_equal(turned.permute(1, 2, 0), by_pillow(data))


def test_broken_exif_turns_nothing():
    data = encode(PICTURE, "JPEG", exif=with_exif(6))
    at = data.index(b"Exif\0\0") + 6
    for junk in (b"\xff" * 12, b"II*\0\xff\xff\xff\x7f", b"MM\0*\0\0\0\x08\0\1\1\x12\0\2\0\0\0\1"):
        broken = data[:at] + junk + data[at + len(junk) :]
        assert decode_image(broken, "x", exif_orientation=True).shape == (3, 45, 67)


def fault(decode, *args, **options):
    with pytest.raises(BadSample, match=r"^shard-1: key: [^\n]+$") as error:
        decode(*args, "shard-1: key", **options)
    return error.value.reason


RUBBISH = [
    b"",
    b"nonsense",
    b"\xff\xd8\xff broken jpeg",
    b"\x89PNG\r\n\x1a\n",
    b"RIFF\0\0\0\0WEBPVP8 ",
    b"GIF89a",
    b"BM",
]


@pytest.mark.parametrize("data", RUBBISH)
def test_rubbish_names_the_sample(data):
    assert fault(decode_image, data) == "not_an_image"
    assert fault(decode_label, data) == "not_a_label"


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "BMP", "PPM", "JPEG2000", "ICO"])
def test_other_formats_are_refused(kind):
    assert fault(decode_image, encode(PICTURE, kind)) == "not_an_image"


@pytest.mark.parametrize("name", FORMATS)
def test_files_cut_short_are_not_filled_up(name):
    data = FORMATS[name].removesuffix(b"more")
    end = len(data) - (0 if "png" in name else 2)
    for cut in {end * 9 // 10, end // 2} - ({end * 9 // 10} if len(data) < 600 or "animated" in name else set()):
        assert fault(decode_image, data[:cut]) == "not_an_image", cut


def test_corrupt_jpeg_data_is_refused():
    data = bytearray(FORMATS["jpeg 4:4:4"])
    data[-400:-300] = b"\xff\xd0" * 50
    assert fault(decode_image, bytes(data)) == "not_an_image"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["jpeg 4:2:0", "jpeg cmyk", "png rgb", "webp", "webp lossless", "webp alpha"])
def test_the_limit_of_pixels_is_ours_alone(name, monkeypatch):
    data, count = FORMATS[name], 45 * 67
    assert fault(decode_image, data, max_pixels=count - 1) == "too_large"
    decode_image(data, "x", max_pixels=count)
    if "webp" not in name:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
        decode_image(data, "x", max_pixels=count)


def test_bombs_are_not_decoded(monkeypatch):
    for size in ((60_000, 60_000), (10_001, 10_000), (2**31 - 1, 2**31 - 1)):
        assert fault(decode_image, png_header(*size)) == "too_large"
        assert fault(decode_label, png_header(*size)) == "too_large"
    large = bytearray(FORMATS["jpeg 4:2:0"])
    at = large.index(b"\xff\xc0") + 5
    large[at : at + 4] = b"\xff\xff\xff\xff"
    assert fault(decode_image, bytes(large)) == "too_large"
    webp = bytearray(FORMATS["webp alpha"])
    webp[24:30] = b"\xff\x3f\0\xff\x3f\0"
    assert fault(decode_image, bytes(webp)) in ("too_large", "not_an_image")


@pytest.mark.parametrize("piece", [1, 3, 1 << 22])
def test_scans_are_counted_wherever_they_begin(monkeypatch, piece):
    monkeypatch.setattr(images, "_PIECE", piece)
    for length in range(40):
        data = bytes(RANDOM.choice([0xFF, 0xDA, 0], length).tolist())
        assert images._count_scans(data) == data.count(b"\xff\xda")


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_jpegs_of_thousands_of_scans_are_refused(mode):
    data = encode(Image.new(mode, (1000, 1000)), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    assert fault(decode_image, data[:last] + data[last:-2] * 600 + data[-2:]) == "not_an_image"
    assert decode_image(data[:last] + data[last:-2] * 30 + data[-2:], "x").shape == (3, 1000, 1000)


def test_labels_hold_the_values_stored():
    cases = {
        "1 bit": (png(LABELS & 1, 1), LABELS & 1),
        "2 bits": (png(LABELS, 2), LABELS),
        "4 bits": (png(LABELS * 5, 4), LABELS * 5),
        "8 bits": (png(LABELS * 85, 8), LABELS * 85),
        "pillow": (encode(LABELS * 9, "PNG"), LABELS * 9),
        "16 bits": (png(LABELS.astype(np.uint16) * 85, 16), LABELS * 85),
        **{
            f"palette of {bits} bits": (
                png(LABELS & 2**bits - 1, bits, 3, RANDOM.bytes(3 * 2**bits)),
                LABELS & 2**bits - 1,
            )
            for bits in (1, 2, 4, 8)
        },
    }
    for name, (data, expected) in cases.items():
        label = decode_label(data, "x", size=(6, 13))
        assert label.dtype == torch.uint8
        assert np.array_equal(label, expected), name
        label += 1


@pytest.mark.parametrize(("bits", "colour"), [(1, 0), (2, 0), (4, 0), (8, 0), (16, 0), (1, 3), (2, 3), (4, 3), (8, 3)])
def test_writers_and_readers_see_the_same_values(bits, colour):
    palette = RANDOM.bytes(3 * 2**bits) if colour == 3 else b""
    data = png(LABELS.astype(np.uint16) & 2**bits - 1, bits, colour, palette)
    assert np.array_equal(decode_raw_values(data, "x"), decode_label(data, "x"))
    assert is_8_bit_grey_png(data) == (bits == 8 and colour == 0)


def test_16_bit_labels_know_no_value_between_255_and_65535():
    values = LABELS.astype(np.uint16)
    values[0, 0] = 65535
    expected = LABELS.copy()
    expected[0, 0] = 250
    assert np.array_equal(decode_label(png(values, 16), "x", ignore_index=250, num_classes=4), expected)
    values[1, 1] = 256
    assert fault(decode_label, png(values, 16)) == "label_value"


def test_values_of_no_class_are_named():
    values = LABELS.copy()
    values[2, 2] = 255
    data = encode(values, "PNG")
    decode_label(data, "x", num_classes=4)
    with pytest.raises(BadSample, match="x: label value 255, but there are 4 classes") as error:
        decode_label(data, "x", num_classes=4, ignore_index=254)
    assert error.value.reason == "label_value"
    with pytest.raises(BadSample, match="label value 3, but there are 2 classes"):
        decode_label(data, "x", num_classes=2)


def test_a_label_of_another_size():
    with pytest.raises(BadSample, match=r"the image is 13 × 6 px .* its label map 6 × 13") as error:
        decode_label(encode(LABELS, "PNG"), "x", size=(13, 6))
    assert error.value.reason == "label_size"


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_labels_of_several_channels_are_refused(mode):
    with pytest.raises(BadSample, match=mode):
        decode_label(encode(PICTURE.convert(mode), "PNG"), "x")


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "BMP"])
def test_labels_are_pngs(kind):
    assert fault(decode_label, encode(PICTURE.convert("L"), kind)) == "not_a_label"
    data = encode(LABELS, "PNG")
    assert fault(decode_label, data[: len(data) // 2]) == "not_a_label"
    assert fault(decode_label, data, max_pixels=10) == "too_large"


def test_names_with_control_characters_are_escaped():
    with pytest.raises(BadSample, match=r"^a\\nb\\x1b\[2J: not a readable image"):
        decode_image(b"", "a\nb\x1b[2J")
