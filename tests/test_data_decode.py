from __future__ import annotations

import contextlib
import io
import pickle
import struct
import subprocess
import sys
import threading
import zlib

import numpy as np
import pytest
from PIL import Image

from autoft.data.pixels.decode import (
    BadImage,
    Noticed,
    centre_crop,
    decode,
    in_threads,
    look,
    normalise,
    read_size,
    to_square,
)
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


def chunked(header, *chunks):
    """A PNG written by hand: kinds and contents of chunks after IHDR."""
    file = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", header), *chunks, (b"IEND", b"")):
        check = struct.pack(">I", zlib.crc32(kind + data))
        file += struct.pack(">I", len(data)) + kind + data + check
    return io.BytesIO(file)


def by_hand(depth, colour_type, line, width, *before):
    header = struct.pack(">IIBBBBB", width, 1, depth, colour_type, 0, 0, 0)
    return chunked(header, *before, (b"IDAT", zlib.compress(b"\0" + line)))


def tiff(bits, photometric, line, width, samples=1, orientation=1):
    """A little-endian TIFF of one line without compression, written by hand."""
    entries = [
        (256, 4, width),
        (257, 4, 1),
        (258, 3, bits),
        (259, 3, 1),
        (262, 3, photometric),
        (273, 4, 8),
        (274, 3, orientation),
        (277, 3, samples),
        (278, 4, 1),
        (279, 4, len(line)),
    ]
    line += bytes(len(line) % 2)
    directory = struct.pack("<H", len(entries))
    for tag, kind, value in entries:
        directory += struct.pack("<HHII", tag, kind, 1, value)
    start = struct.pack("<2sHI", b"II", 42, 8 + len(line))
    return io.BytesIO(start + line + directory + bytes(4))


# Each line is written out, and so is what it must become; nothing here comes from Pillow.
GOLDEN = {
    "I07-1bit-png": (lambda: by_hand(1, 0, b"\xa0", 4), [255, 0, 255, 0]),
    "I07-2bit-png": (lambda: by_hand(2, 0, b"\x1b", 4), [0, 85, 170, 255]),
    "I07-grey-png": (lambda: by_hand(8, 0, b"\x00\x07\xff", 3), [0, 7, 255]),
    "I07-grey-pgm": (lambda: io.BytesIO(b"P5 3 1 255\n\x00\x07\xff"), [0, 7, 255]),
    "I07-bits-pbm": (lambda: io.BytesIO(b"P1 3 1\n1 0 1\n"), [0, 255, 0]),
    "I07-LA": (
        lambda: by_hand(8, 4, b"\x64\x00\x64\xff\x00\x33", 3),
        [255, 100, 204],  # 100 unseen, 100 in full, black at a fifth
    ),
    "I07-palette": (
        lambda: by_hand(8, 3, b"\x01\x00", 2, (b"PLTE", bytes([9, 8, 7, 1, 2, 3]))),
        [[1, 2, 3], [9, 8, 7]],
    ),
    "I07-palette-tRNS": (
        lambda: by_hand(
            8, 3, b"\x01\x00", 2, (b"PLTE", bytes([9, 8, 7, 1, 2, 3])), (b"tRNS", b"\xff\x00")
        ),
        [[255, 255, 255], [9, 8, 7]],
    ),
    "I07-grey-tRNS": (
        lambda: by_hand(8, 0, b"\x05\x06", 2, (b"tRNS", b"\0\x05")),
        [255, 6],
    ),
    "I07-RGB-tRNS": (
        lambda: by_hand(8, 2, bytes([1, 2, 3, 1, 2, 4]), 2, (b"tRNS", b"\0\x01\0\x02\0\x03")),
        [[255, 255, 255], [1, 2, 4]],
    ),
    "I07-RGBA": (
        lambda: by_hand(8, 6, bytes([10, 20, 30, 255, 10, 20, 30, 0, 255, 0, 0, 51]), 3),
        [[10, 20, 30], [255, 255, 255], [255, 204, 204]],
    ),
    "I07-CMYK": (
        lambda: encoded(
            Image.frombytes("CMYK", (3, 1), bytes([0, 255, 255, 0] * 2 + [0, 0, 0, 102])), "tiff"
        ),
        [[255, 0, 0], [255, 0, 0], [153, 153, 153]],  # (255 - ink) x (255 - black) / 255
    ),
    "I07-white-is-zero-tiff": (lambda: tiff(8, 0, b"\x00\x07\xff", 3), [255, 248, 0]),
    "I08-grey-png": (
        lambda: by_hand(16, 0, b"\x00\x00\x01\x01\x80\x80\xff\xff", 4),
        [0, 1, 128, 255],
    ),
    "I08-grey-tRNS": (
        lambda: by_hand(16, 0, b"\x01\x01\x80\x80", 2, (b"tRNS", b"\x01\x01")),
        [255, 128],
    ),
    "I08-grey-alpha": (
        lambda: by_hand(16, 4, b"\x80\x80\xff\xff\x80\x80\x00\x00", 2),
        [128, 255],
    ),
    "I08-RGB": (
        lambda: by_hand(16, 2, b"\x01\x01\x80\x80\xff\xff", 1),
        [[1, 128, 255]],
    ),
    "I08-RGB-tRNS": (
        lambda: by_hand(
            16,
            2,
            b"\x01\x05\x02\x06\x03\x07\x09\x05\x02\x06\x03\x07",
            2,
            (b"tRNS", b"\x01\x05\x02\x06\x03\x07"),
        ),
        [[255, 255, 255], [9, 2, 3]],
    ),
    "I08-RGBA": (
        lambda: by_hand(16, 6, b"\x0a\x0a\x14\x14\x1e\x1e\xff\xff", 1),
        [[10, 20, 30]],
    ),
    "I08-grey-tiff": (lambda: tiff(16, 1, b"\x00\x00\x80\x80\xff\xff", 3), [0, 128, 255]),
    "I08-white-is-zero-tiff": (
        lambda: tiff(16, 0, b"\x00\x00\x80\x80\xff\xff", 3),
        [255, 127, 0],
    ),
    "I08-12bit-tiff": (lambda: tiff(12, 1, b"\x00\x08\x08\xff\xf0", 3), [0, 128, 255]),
    "I08-grey-pgm": (lambda: io.BytesIO(b"P5 2 1 65535\n\x80\x80\xff\xff"), [128, 255]),
    "I08-10bit-pgm": (lambda: io.BytesIO(b"P5 2 1 1023\n\x02\x02\x03\xff"), [128, 255]),
    "I10-tiff": (lambda: tiff(8, 1, b"\x01\x02\x03", 3, orientation=3), [3, 2, 1]),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_arrays(name):
    source, pixels = GOLDEN[name]
    expected = np.array(pixels, np.uint8)
    expected = expected if expected.ndim == 2 else np.stack([expected] * 3, axis=-1)
    np.testing.assert_array_equal(np.asarray(decode(source()))[0], expected)
    np.testing.assert_array_equal(np.asarray(look(source(), "").image)[0], expected)


def test_ycbcr_is_that_of_jfif():
    luma, blue, red = 120, 100, 180
    source = encoded(Image.new("YCbCr", (8, 8), (luma, blue, red)), "tiff")
    expected = [
        luma + 1.402 * (red - 128),
        luma - 0.344136 * (blue - 128) - 0.714136 * (red - 128),
        luma + 1.772 * (blue - 128),
    ]
    np.testing.assert_allclose(np.asarray(decode(source))[4, 4], expected, atol=1.5)


def test_an_opaque_alpha_changes_nothing_and_is_not_noticed():
    opaque = Image.fromarray(noise()).convert("RGBA")
    looked = look(encoded(opaque, "png"), ".png")
    assert looked.noticed == Noticed(0)
    np.testing.assert_array_equal(np.asarray(looked.image), noise())


def animation(file_format):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE)]
    return encoded(frames[0], file_format, save_all=True, append_images=frames[1:])


def turned(file_format, **options):
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(Image.fromarray(noise()), file_format, exif=exif, **options)


@pytest.mark.parametrize(
    ("source", "suffix", "expected"),
    [
        pytest.param(lambda: plain("RGB", RED), ".PNG", Noticed(0), id="plain"),
        pytest.param(lambda: plain("RGB", RED), ".jpg", Noticed.WRONG_SUFFIX, id="I04"),
        pytest.param(lambda: plain("RGB", RED), "", Noticed(0), id="I04-no-suffix"),
        pytest.param(lambda: plain("RGB", RED, "jpeg"), ".jpeg", Noticed(0), id="jpeg"),
        pytest.param(lambda: animation("mpo"), ".jpg", Noticed(0), id="mpo-is-a-jpeg"),
        pytest.param(lambda: animation("gif"), ".gif", Noticed.FIRST_FRAME, id="I11-gif"),
        pytest.param(lambda: animation("png"), ".png", Noticed.FIRST_FRAME, id="I11-apng"),
        pytest.param(lambda: animation("webp"), ".webp", Noticed.FIRST_FRAME, id="I11-webp"),
        pytest.param(lambda: animation("tiff"), ".tif", Noticed.FIRST_PAGE, id="I09-pages"),
        pytest.param(lambda: plain("RGB", RED, "gif"), ".gif", Noticed(0), id="still-gif"),
        pytest.param(lambda: plain("RGBA", (*RED, 9)), ".png", Noticed.ALPHA, id="alpha"),
        pytest.param(lambda: plain("L", 9), ".png", Noticed.GREY, id="grey"),
        pytest.param(lambda: plain("1", 1), ".png", Noticed.GREY, id="1-bit"),
        pytest.param(
            lambda: encoded(Image.fromarray(RAMP), "png"),
            ".png",
            Noticed.GREY | Noticed.DEEP,
            id="I08-grey",
        ),
        pytest.param(lambda: png(np.stack([RAMP] * 3, 2), 2), ".png", Noticed.DEEP, id="I08-rgb"),
        pytest.param(
            lambda: GOLDEN["I08-12bit-tiff"][0](), ".tif", Noticed.GREY | Noticed.DEEP, id="12"
        ),
        pytest.param(
            lambda: GOLDEN["I08-10bit-pgm"][0](), ".pgm", Noticed.GREY | Noticed.DEEP, id="10"
        ),
        pytest.param(
            lambda: plain("CMYK", (0, 255, 255, 0), "jpeg"), ".jpg", Noticed.CMYK, id="CMYK"
        ),
        pytest.param(lambda: turned("jpeg"), ".jpg", Noticed.TURNED, id="I10-jpeg"),
        pytest.param(lambda: turned("png"), ".png", Noticed.TURNED, id="I10-png"),
        pytest.param(lambda: turned("tiff"), ".tif", Noticed.TURNED, id="I10-tiff"),
        pytest.param(
            lambda: encoded(Image.new("RGB", (20_000, 1)), "png"),
            ".png",
            Noticed.EXTREME,
            id="I12-line",
        ),
        pytest.param(
            lambda: encoded(Image.new("RGB", (200, 10)), "png"), ".png", Noticed(0), id="20-to-1"
        ),
    ],
)
def test_what_is_noticed(source, suffix, expected):
    looked = look(source(), suffix)
    assert looked.noticed == expected
    assert looked.size == looked.image.size == read_size(source())
    np.testing.assert_array_equal(np.asarray(looked.image), np.asarray(decode(source())))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("exif", [b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0no TIFF at all"])
def test_damaged_exif_is_no_reason_to_refuse_an_image(exif):
    data = encoded(Image.fromarray(noise()), "jpeg", exif=exif).getvalue()
    looked = look(io.BytesIO(data), ".jpg")
    assert (looked.size, looked.noticed) == ((16, 24), Noticed(0))
    assert read_size(io.BytesIO(data)) == (16, 24)


def test_damage_behind_the_first_frame_of_a_gif_is_no_matter():
    data = animation("gif").getvalue()
    looked = look(io.BytesIO(data[: data.rindex(b",") + 3]), ".gif")
    assert np.abs(np.asarray(looked.image).astype(int) - RED).max() <= 2


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


def random_pixels(*shape):
    return np.random.default_rng(3).integers(0, 256, (37, 29, *shape), dtype=np.uint8)


def see_through_palette(top):
    image = Image.fromarray(random_pixels() % top).convert("P")
    image.putpalette(random_pixels(3).tobytes()[:768])
    return encoded(image, "png", transparency=bytes(range(255, 255 - top, -1)))


STRIPPED = {
    "palette": lambda: see_through_palette(200),
    "palette-opaque": lambda: see_through_palette(1),
    "palette-one": lambda: encoded(Image.fromarray(random_pixels()), "gif", transparency=7),
    "grey-one": lambda: encoded(Image.fromarray(random_pixels()), "png", transparency=7),
    "rgb-one": lambda: encoded(
        Image.fromarray(random_pixels(3) // 200), "png", transparency=(1, 0, 1)
    ),
    "LA": lambda: encoded(Image.fromarray(random_pixels(2), "LA"), "png"),
    "RGBA": lambda: encoded(Image.fromarray(random_pixels(4)), "png"),
    "half-opaque": lambda: encoded(
        Image.fromarray(random_pixels(4) | np.uint8([0, 0, 0, 255]) * half()), "png"
    ),
    "deep-grey": lambda: encoded(Image.fromarray(random_pixels().astype(np.uint16) * 257), "png"),
    "deep-pgm": lambda: encoded(Image.fromarray(random_pixels().astype(np.uint16) * 257), "ppm"),
    "deep-alpha": lambda: png(random_pixels(4).astype(np.uint16) * 257, 6),
}


def half():
    return (np.arange(37) < 20)[:, None, None].astype(np.uint8)


@pytest.mark.parametrize("name", STRIPPED)
def test_strips_are_the_whole_bit_for_bit(name, monkeypatch):
    whole = look(STRIPPED[name](), "")
    monkeypatch.setattr("autoft.data.pixels.convert.STRIP", 100)
    strips = look(STRIPPED[name](), "")
    np.testing.assert_array_equal(np.asarray(strips.image), np.asarray(whole.image))
    assert strips.noticed == whole.noticed


def test_opaque_pixels_are_left_as_they_are_by_what_is_transparent_beside_them():
    values = np.arange(256, dtype=np.uint8)
    pixels = np.stack([values, values[::-1], values // 2, np.full(256, 255, np.uint8)], 1)[None]
    pixels = np.concatenate([pixels, pixels & np.uint8([255, 255, 255, 0])])
    decoded = np.asarray(decode(encoded(Image.fromarray(pixels), "png")))
    np.testing.assert_array_equal(decoded[0], pixels[0, :, :3])
    assert (decoded[1] == 255).all()


def test_one_large_image_is_decoded_at_a_time(monkeypatch):
    monkeypatch.setattr("autoft.data.pixels.decode.LARGE", 100)
    both, inside, most = threading.Barrier(2), [], []

    def slow(image):
        inside.append(image)
        most.append(len(inside))
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.2 if image.width > 10 else 10)
        inside.pop()
        return image.copy(), Noticed(0)

    monkeypatch.setattr("autoft.data.pixels.decode.convert", slow)
    for size, expected in ((10, 2), (11, 1)):
        most.clear()
        data = encoded(Image.new("RGB", (size, size)), "png").getvalue()
        list(in_threads(lambda data: decode(io.BytesIO(data)), [data, data], workers=2))
        assert max(most) == expected


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_a_large_palette_with_transparency_is_not_in_memory_several_times(tmp_path):
    side = 4096
    image = Image.new("P", (side, side), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.save(tmp_path / "large.png", transparency=b"\x80\x40", compress_level=1)
    _, kilobytes = read_alone([tmp_path / "large.png"])
    # One byte a pixel as it is and four as RGB; with RGBA and its white ground it were 13.
    assert kilobytes < 80_000 + 8 * side * side // 1024


def test_a_png_named_jpg_is_read(tmp_path):
    path = tmp_path / "I04.jpg"
    path.write_bytes(encoded(Image.fromarray(noise()), "png").getvalue())
    np.testing.assert_array_equal(np.asarray(decode(path)), noise())


ALONE = """
import pathlib, re, sys
started = []
spawning = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty"}
sys.addaudithook(lambda event, args: started.append(event) if event in spawning else None)
from autoft.data.pixels.decode import BadImage, decode, look, read_size
readers = [read_size, decode, lambda path: look(path.open("rb"), path.suffix)]
for path in map(pathlib.Path, sys.argv[1:]):
    for read in readers:
        try:
            read(path)
        except BadImage as error:
            print(error.reason)
assert not started, started
assert not {"torch", "PIL.EpsImagePlugin", "PIL.PsdImagePlugin"} & set(sys.modules)
# Not getrusage: its peak is inherited from the process that started this one.
print(re.search("VmHWM:\\s*(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])
"""


def read_alone(paths):
    """Return the reasons for which a process of its own refused, and its peak in kilobytes."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ALONE, *paths],
        capture_output=True,
        text=True,
        check=True,
    )
    *reasons, kilobytes = done.stdout.splitlines()
    return reasons, int(kilobytes)


def write_large(path, side):
    """A PNG of `side` x `side` bits, of which no more than a line is ever in memory."""
    compressor, line = zlib.compressobj(), bytes(1 + side // 8)
    body = b"".join(compressor.compress(line) for _ in range(side)) + compressor.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    path.write_bytes(chunked(header, (b"IDAT", body)).getvalue())


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_i06_a_decompression_bomb_is_refused_from_its_header(tmp_path):
    write_large(tmp_path / "400-megapixels.png", 20_000)
    write_large(tmp_path / "121-megapixels.png", 11_000)
    (tmp_path / "claims.png").write_bytes(png(RAMP, 0, size=(50_000, 50_000)).getvalue())
    claims = bytearray(encoded(Image.fromarray(noise()), "bmp").getvalue())
    claims[18:26] = struct.pack("<II", 50_000, 50_000)
    (tmp_path / "claims.bmp").write_bytes(claims)
    paths = sorted(tmp_path.iterdir())
    reasons, kilobytes = read_alone(paths)
    assert len(reasons) == 3 * len(paths)
    assert all("pixels" in reason for reason in reasons)
    assert kilobytes < 300_000


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_i05_no_process_is_started_for_another_format(tmp_path):
    names = [name for name in BAD if name.startswith("I05")]
    for name in names:
        (tmp_path / name).write_bytes(BAD[name][0])
    reasons, _ = read_alone(sorted(tmp_path.iterdir()))
    assert reasons == ["no image of an accepted format"] * 3 * len(names)


@pytest.mark.parametrize("size", [(1, 1), (20_000, 1), (1, 20_000), (9, 7)], ids="I12-{}".format)
def test_extreme_shapes_become_a_square(size):
    assert to_square(decode(encoded(Image.new("RGB", size, RED), "png")), 224).shape == (
        *(224, 224),
        3,
    )


def test_threads_keep_the_order_work_ahead_by_a_bounded_number_and_stop_with_the_consumer():
    started, progress = [], []

    def work(item):
        started.append(item)
        return -item

    results = in_threads(
        work, range(1000), workers=2, progress=lambda done, total: progress.append((done, total))
    )
    assert [next(results) for _ in range(3)] == [0, -1, -2]
    assert len(started) <= 32 + 3
    results.close()
    assert len(started) <= 32 + 3
    assert list(in_threads(work, range(70), workers=2)) == [-item for item in range(70)]
    assert progress == []
    list(in_threads(work, range(70), workers=2, progress=lambda *call: progress.append(call)))
    assert progress == [(32, 70), (64, 70), (70, 70)]


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
