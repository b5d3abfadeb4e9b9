from __future__ import annotations

import io
import pickle
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from autoft.data.decode import BadImage, centre_crop, decode, normalise, read_size, to_square
from autoft.errors import DataError, UsageError
from autoft.values import Preprocess


def encoded(image, file_format, **options):
    file = io.BytesIO()
    image.save(file, file_format, **options)
    file.seek(0)
    return file


def png(array, colour_type, size=None):
    """A 16-bit PNG written by hand, because Pillow writes none in colour."""
    height, width = size or array.shape[:2]
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in array)

    def chunk(kind, data):
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + body)


def noise(height=24, width=16):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def palette(**options):
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    return encoded(image, "png", **options)


def plain(mode, colour, file_format="png"):
    return encoded(Image.new(mode, (8, 8), colour), file_format)


RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


@pytest.mark.parametrize(
    ("source", "first", "last", "tolerance"),
    [
        pytest.param(lambda: plain("L", 90), (90,) * 3, (90,) * 3, 0, id="I07-grey"),
        pytest.param(lambda: plain("LA", (100, 128)), (177,) * 3, (177,) * 3, 1, id="I07-LA"),
        pytest.param(palette, RED, BLUE, 0, id="I07-palette"),
        pytest.param(lambda: palette(transparency=0), WHITE, BLUE, 0, id="I07-palette-tRNS"),
        pytest.param(
            lambda: palette(transparency=b"\x80\xff"), (255, 127, 127), BLUE, 1, id="I07-P-bytes"
        ),
        pytest.param(lambda: plain("1", 1), WHITE, WHITE, 0, id="I07-1bit"),
        pytest.param(lambda: plain("RGBA", (*RED, 0)), WHITE, WHITE, 0, id="I07-RGBA-clear"),
        pytest.param(lambda: plain("RGBA", (*RED, 255)), RED, RED, 0, id="I07-RGBA-opaque"),
        pytest.param(
            lambda: plain("CMYK", (0, 255, 255, 0), "jpeg"), RED, RED, 3, id="I07-CMYK-jpeg"
        ),
        pytest.param(
            lambda: plain("CMYK", (0, 255, 255, 0), "tiff"), RED, RED, 0, id="I07-CMYK-tiff"
        ),
        pytest.param(
            lambda: plain("YCbCr", (76, 85, 255), "tiff"), RED, RED, 3, id="I07-YCbCr-tiff"
        ),
        pytest.param(lambda: plain("RGB", RED, "jpeg"), RED, RED, 3, id="I07-YCbCr-jpeg"),
    ],
)
def test_every_mode_becomes_rgb_with_alpha_on_white(source, first, last, tolerance):
    pixels = np.asarray(decode(source())).astype(int)
    assert pixels.shape[2] == 3
    assert np.abs(pixels[0, 0] - first).max() <= tolerance
    assert np.abs(pixels[-1, -1] - last).max() <= tolerance


RAMP = np.linspace(0, 65535, 24 * 16).reshape(24, 16).astype(np.uint16)


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(lambda: encoded(Image.fromarray(RAMP), "png"), id="I08-grey-png"),
        pytest.param(lambda: encoded(Image.fromarray(RAMP), "tiff"), id="I08-grey-tiff"),
        pytest.param(lambda: encoded(Image.fromarray(RAMP), "ppm"), id="I08-grey-pgm"),
        pytest.param(lambda: png(np.stack([RAMP] * 3, axis=2), 2), id="I08-rgb-png"),
    ],
)
def test_sixteen_bits_are_scaled_not_clipped(source):
    pixels = np.asarray(decode(source())).astype(float)
    assert np.abs(pixels - RAMP[..., None] / 257).max() <= 1


TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", TURNS, ids=lambda turn: f"I10-exif{turn}")
@pytest.mark.parametrize(
    ("file_format", "options"), [("png", {}), ("tiff", {}), ("webp", {"lossless": True})]
)
def test_exif_orientation_is_applied(orientation, file_format, options):
    stored = noise()
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = encoded(Image.fromarray(stored), file_format, exif=exif, **options)
    upright = TURNS[orientation](stored)
    assert read_size(file) == (upright.shape[1], upright.shape[0])
    np.testing.assert_array_equal(np.asarray(decode(file)), upright)


def test_exif_orientation_is_applied_to_a_jpeg(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "x.jpg"
    Image.fromarray(noise()).save(path, exif=exif, quality=95)
    unturned = np.asarray(Image.open(path))
    assert read_size(path) == (24, 16)
    np.testing.assert_array_equal(np.asarray(decode(path)), np.rot90(unturned, -1))


@pytest.mark.parametrize("file_format", ["gif", "png", "webp", "tiff"], ids="I11-{}".format)
def test_first_frame_of_an_animation(file_format):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE)]
    file = encoded(frames[0], file_format, save_all=True, append_images=frames[1:])
    assert Image.open(file).n_frames == 2
    assert np.abs(np.asarray(decode(file)).astype(int) - RED).max() <= 2


def truncated(file_format):
    data = encoded(Image.fromarray(noise(64, 64)), file_format).getvalue()
    return data[: len(data) // 2]


BAD = {
    "I01-empty.jpg": (b"", "no image"),
    "I02-half.jpg": (truncated("jpeg"), "truncated"),
    "I02-half.png": (truncated("png"), "damaged"),
    "I02-half.webp": (truncated("webp"), ""),
    "I03-html.jpg": (b"<!DOCTYPE html><html><body>404</body></html>", "no image"),
    "I05-eps.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "no image"),
    "I05-svg.png": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "no image"),
    "I05-psd.jpg": (b"8BPS\x00\x01" + bytes(40), "no image"),
    "I05-hdf5.jpg": (b"\x89HDF\r\n\x1a\n" + bytes(40), "no image"),
    "I09-float.tif": (
        encoded(Image.fromarray(np.ones((4, 4), np.float32)), "tiff").getvalue(),
        "no defined range",
    ),
    "I09-int32.tif": (
        encoded(Image.fromarray(np.ones((4, 4), np.int32)), "tiff").getvalue(),
        "no defined range",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_with_a_reason(name, tmp_path):
    content, reason = BAD[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(BadImage) as caught:
        decode(path)
    assert reason in caught.value.reason
    assert name in str(caught.value)
    assert isinstance(caught.value, DataError)
    assert pickle.loads(pickle.dumps(caught.value)).reason == caught.value.reason


def test_a_png_named_jpg_is_read(tmp_path):
    path = tmp_path / "I04.jpg"
    path.write_bytes(encoded(Image.fromarray(noise()), "png").getvalue())
    np.testing.assert_array_equal(np.asarray(decode(path)), noise())


BOMB = """
import pathlib, re, sys
from autoft.data.decode import BadImage, decode, read_size
for path in sys.argv[1:]:
    for read in (read_size, decode):
        try:
            read(pathlib.Path(path))
        except BadImage as error:
            print(error.reason)
assert "torch" not in sys.modules
# Not getrusage: its peak is inherited from the process that started this one.
print(re.search("VmHWM:\\s*(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_a_decompression_bomb_is_refused_from_its_header(tmp_path):
    (tmp_path / "claims.png").write_bytes(png(RAMP, 0, size=(50_000, 50_000)).getvalue())
    Image.new("1", (11_000, 11_000)).save(tmp_path / "real.png")
    paths = [tmp_path / "claims.png", tmp_path / "real.png"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BOMB, *paths],
        capture_output=True,
        text=True,
        check=True,
    )
    *reasons, kilobytes = done.stdout.splitlines()
    assert len(reasons) == 4
    assert all("pixels" in reason for reason in reasons)
    assert int(kilobytes) < 300_000


@pytest.mark.parametrize("size", [(1, 1), (20_000, 1), (1, 20_000), (9, 7)], ids="I12-{}".format)
def test_extreme_shapes_become_a_square(size):
    assert to_square(decode(encoded(Image.new("RGB", size, RED), "png")), 224).shape == (
        *(224, 224),
        3,
    )


def test_to_square_is_resize_of_the_shorter_side_then_centre_crop():
    image = Image.fromarray(noise(64, 96)).resize((96, 64), Image.Resampling.BOX)
    whole = image.resize((48, 32), Image.Resampling.BICUBIC)
    expected = np.asarray(whole)[:, 8:40]
    np.testing.assert_allclose(to_square(image, 32, "bicubic").astype(int), expected, atol=1)


def test_unknown_interpolation_suggests_a_known_one():
    with pytest.raises(UsageError, match="Did you mean 'bicubic'"):
        to_square(Image.new("RGB", (4, 4)), 4, "bicubik")


def test_normalise_crops_scales_and_standardises():
    pixels = np.random.default_rng(1).integers(0, 256, (2, 10, 10, 3), dtype=np.uint8)
    pre = Preprocess(image_size=6, resize=10, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    expected = (pixels[:, 2:8, 2:8] / 255 - pre.mean) / pre.std
    values = normalise(pixels, pre)
    assert values.dtype == np.float32
    assert values.flags.c_contiguous
    np.testing.assert_allclose(values, expected.transpose(0, 3, 1, 2), atol=1e-6)


def test_centre_crop_larger_than_the_images_is_a_usage_error():
    with pytest.raises(UsageError, match="at most 4"):
        centre_crop(np.zeros((1, 4, 4, 3), np.uint8), 5)
