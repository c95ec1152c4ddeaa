"""Images of every mode that Pillow opens: right in training, validation and prediction, or refused in a sentence."""

import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from popup_surgery import DataError, evaluate, predict, train
from popup_surgery.config.schema import Data
from popup_surgery.data.open import open_image
from popup_surgery.data.pixels import SUFFIXES, eight_bits
from support import joined, opened, recipe

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
NOISE = np.random.default_rng(0).integers(0, 256, (16, 16, 4), dtype=np.uint8)
COLOURS = NOISE[..., :3]
FLAT = np.tile(np.array([204, 153, 102]), (16, 16, 1))
INDEXED = COLOURS.reshape(256, 3)[RAMP]
MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def grey(values: NDArray[Any]) -> NDArray[Any]:
    return np.stack([values] * 3, 2)


def luma(colours: NDArray[Any]) -> NDArray[Any]:
    """The grey of colours (ITU-R BT.601), [height, width, 1]."""
    return (colours.astype(float) @ [0.299, 0.587, 0.114])[..., None].round()


def raw(mode: str, values: NDArray[Any]) -> Image.Image:
    return Image.frombytes(mode, (16, 16), np.ascontiguousarray(values).tobytes())


def wide(mode: str, factor: int = 257) -> Image.Image:
    values = RAMP.astype(np.uint16) * factor
    return raw(mode, values.astype(">u2" if mode.endswith("B") else "<u2"))


def palette(mode: str = "P") -> Image.Image:
    image = Image.fromarray(RAMP).convert(mode)
    image.putpalette(COLOURS.tobytes())
    return image


def cmyk() -> NDArray[Any]:
    return ((255 - COLOURS.astype(float)) * (255 - NOISE[..., 3:].astype(float)) / 255).round()


# The image, the format of its file, what Pillow's `save` is told, its colours, and by how much those may differ.
CASES: dict[str, tuple[Image.Image, str, dict[str, Any], NDArray[Any], int]] = {
    "1": (Image.fromarray(RAMP > 99), "PNG", {}, grey(np.where(RAMP > 99, 255, 0)), 0),
    "L": (Image.fromarray(RAMP), "PNG", {}, grey(RAMP), 0),
    "L with a transparent grey": (Image.fromarray(RAMP), "PNG", {"transparency": 7}, grey(RAMP), 0),
    "LA": (raw("LA", np.stack([RAMP, NOISE[..., 3]], 2)), "PNG", {}, grey(RAMP), 0),
    "P": (palette(), "PNG", {}, INDEXED, 0),
    "P of a GIF": (palette(), "GIF", {}, INDEXED, 0),
    "P with a transparent index": (palette(), "PNG", {"transparency": 7}, INDEXED, 0),
    "P with transparencies": (palette(), "PNG", {"transparency": bytes(range(256))}, INDEXED, 0),
    "RGB": (Image.fromarray(COLOURS), "PNG", {}, COLOURS, 0),
    "RGB with a transparent colour": (Image.fromarray(COLOURS), "PNG", {"transparency": (1, 2, 3)}, COLOURS, 0),
    "RGBA": (Image.fromarray(NOISE), "PNG", {}, COLOURS, 0),
    "RGBA of a WebP": (Image.fromarray(NOISE), "WEBP", {"lossless": True, "exact": True}, COLOURS, 0),
    "CMYK": (raw("CMYK", NOISE), "TIFF", {}, cmyk(), 1),
    "CMYK of a JPEG": (Image.new("CMYK", (16, 16), (51, 102, 153, 0)), "JPEG", {}, FLAT, 2),
    "YCbCr": (Image.fromarray(COLOURS).convert("YCbCr"), "TIFF", {}, COLOURS, 3),
    "LAB": (raw("LAB", np.stack([RAMP * 0 + 136, RAMP * 0, RAMP * 0], 2)), "TIFF", {}, grey(RAMP * 0 + 127), 2),
    "I of a PGM": (wide("I;16"), "PPM", {}, grey(RAMP), 0),
    "I;16": (wide("I;16"), "PNG", {}, grey(RAMP), 0),
    "I;16 that was widened by zeros": (wide("I;16", 256), "PNG", {}, grey(RAMP), 0),
    "I;16 of a TIFF": (wide("I;16"), "TIFF", {}, grey(RAMP), 0),
    "I;16 of a TIFF whose white is zero": (wide("I;16"), "TIFF", {"tiffinfo": {262: 0}}, grey(255 - RAMP), 0),
    "I;16B": (wide("I;16B"), "TIFF", {}, grey(RAMP), 0),
    "I;16 of a JPEG 2000": (wide("I;16"), "JPEG2000", {}, grey(RAMP), 0),
    "I;16 with a transparent grey": (wide("I;16"), "PNG", {"transparency": 257}, grey(RAMP), 0),
    "F": (Image.fromarray((RAMP / 255).astype(np.float32)), "TIFF", {}, grey(RAMP), 0),
    "F of a PFM": (Image.fromarray((RAMP / 255).astype(np.float32)), "PPM", {}, grey(RAMP), 0),
}  # fmt: skip


def folder_of(root: Path, write: Callable[[Path], Any], suffix: str) -> Path:
    """A data set of two classes whose four images are all the same; the first of its images."""
    for split in ("train", "validation"):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            write(root / split / name / f"0.{suffix}")
    return root / "validation" / "a" / f"0.{suffix}"


def readings(root: Path, image: Path, channels: int, **data: Any) -> dict[str, NDArray[Any]]:
    """The image as training, validation and prediction see it, uint8 [height, width, channels]."""
    size = (channels, 16, 16)
    plain: dict[str, Any] = {"mean": [0.0] * channels, "std": [1.0] * channels}
    config = {"name": "folder", "root": str(root), "batch_size": 4, **plain, **data}
    held = opened(size, in_memory=True, **config)
    streamed = opened(size, in_memory=False, scale=[1.0, 1.0], ratio=[1.0, 1.0], **config)
    found = {"predict": open_image(image, Data(**config), size)}
    for name, batches in (("held", held), ("streamed", streamed)):
        found |= {f"train, {name}": joined(batches.train(0))[0][0], f"val, {name}": joined(batches.validation())[0][0]}
    return {name: pixels.mul(255).round().to(torch.uint8).permute(1, 2, 0).numpy() for name, pixels in found.items()}


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("case", CASES)
def test_an_image_has_its_colours_wherever_it_is_read(case: str, channels: int, tmp_path: Path) -> None:
    image, kind, options, colours, tolerance = CASES[case]
    file = folder_of(tmp_path, lambda path: image.save(path, kind, **options), kind.lower().replace("jpeg2000", "jp2"))
    wanted = luma(colours) if channels == 1 else colours
    found = readings(tmp_path, file, channels)
    assert len(found) == 5
    for name, pixels in found.items():
        assert np.abs(pixels[..., :3].astype(int) - wanted).max() <= tolerance + (channels == 1), name
        assert np.array_equal(pixels, found["predict"]), name


@pytest.mark.parametrize(
    ("case", "alpha"),
    [
        ("L with a transparent grey", np.where(RAMP == 7, 0, 255)),
        ("LA", NOISE[..., 3]),
        ("P", RAMP * 0 + 255),
        ("P with a transparent index", np.where(RAMP == 7, 0, 255)),
        ("P with transparencies", RAMP),
        ("RGB", RAMP * 0 + 255),
        ("RGBA", NOISE[..., 3]),
        ("CMYK", RAMP * 0 + 255),
        ("I;16", RAMP * 0 + 255),
        ("I;16 with a transparent grey", np.where(RAMP == 1, 0, 255)),
        ("F", RAMP * 0 + 255),
    ],
)
def test_four_channels_are_rgba(case: str, alpha: NDArray[Any], tmp_path: Path) -> None:
    image, kind, options, *_ = CASES[case]
    image.save(tmp_path / "image", kind, **options)
    with Image.open(tmp_path / "image") as opened_image:
        assert np.array_equal(np.asarray(eight_bits(opened_image, "RGBA"))[..., 3], alpha)


@pytest.mark.parametrize(
    ("image", "colours", "tolerance"),
    [
        (raw("La", np.stack([RAMP // 2, RAMP * 0 + 128], 2)), grey(RAMP), 3),
        (raw("RGBa", np.stack([RAMP // 2] * 3 + [RAMP * 0 + 128], 2)), grey(RAMP), 3),
        (palette("PA"), INDEXED, 0),
        (raw("RGBX", NOISE), COLOURS, 0),
        (Image.fromarray(COLOURS).convert("HSV"), COLOURS, 8),
        (wide("I;16L"), grey(RAMP), 0),
        (wide("I;16N"), grey(RAMP), 0),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else "",
)
def test_modes_that_few_files_have(image: Image.Image, colours: NDArray[Any], tolerance: int) -> None:
    for mode in MODES.values():
        found = eight_bits(image, mode)
        assert (found.mode, found.size) == (mode, image.size)
        wanted = luma(colours) if mode == "L" else colours
        pixels = np.asarray(found).reshape(16, 16, -1)[..., :3].astype(int)
        assert np.abs(pixels - wanted).max() <= tolerance + (mode == "L"), mode


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
def test_images_are_turned_as_their_exif_says(orientation: int, suffix: str, tmp_path: Path) -> None:
    upright = np.zeros((16, 16), np.uint8)
    upright[:8, :8], upright[:8, 8:], upright[8:, :8] = 250, 170, 90
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.T,
        6: np.rot90(upright), 7: np.rot90(upright, 2).T, 8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[274] = orientation
    image = Image.fromarray(np.ascontiguousarray(stored))
    options: Any = {"png": {}, "jpg": {"quality": 100}, "tif": {}, "webp": {"lossless": True}}[suffix]
    file = folder_of(tmp_path, lambda path: image.save(path, exif=exif, **options), suffix)
    for name, pixels in readings(tmp_path, file, 3).items():
        assert np.abs(pixels.astype(int) - grey(upright)).max() <= 3, name


def test_a_turned_image_has_the_networks_size_as_it_is_seen(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(NOISE[:12, :, :3]).save(tmp_path / "image.png", exif=exif)
    config = Data(name="folder", mean=[0.0] * 3, std=[1.0] * 3)
    found = open_image(tmp_path / "image.png", config, (3, 16, 12)).mul(255).round().to(torch.uint8)
    assert np.array_equal(found.permute(1, 2, 0).numpy(), np.rot90(NOISE[:12, :, :3], -1))


def test_damaged_exif_does_not_make_an_image_unreadable(tmp_path: Path) -> None:
    Image.fromarray(COLOURS).save(tmp_path / "image.png", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xffnonsense")
    with Image.open(tmp_path / "image.png") as image:
        assert np.array_equal(np.asarray(eight_bits(image, "RGB")), COLOURS)


def twelve_bits(path: Path) -> None:
    """A TIFF of 12 bits, which Pillow reads and does not write: 16 × 16 values, two in three bytes."""
    values = (RAMP.astype(int) * 4095 // 255).reshape(-1, 2)
    first, second = values[:, 0], values[:, 1]
    data = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1).astype(np.uint8).tobytes()
    entries = [(256, 3, 16), (257, 3, 16), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 0), (277, 3, 1),
               (278, 3, 16), (279, 4, len(data))]  # fmt: skip
    start = 8 + 2 + 12 * len(entries) + 4
    packed = b"".join(
        struct.pack("<HHI", tag, kind, 1) + struct.pack("<I", start if tag == 273 else value)
        for tag, kind, value in entries
    )
    path.write_bytes(b"II*\0" + struct.pack("<IH", 8, len(entries)) + packed + bytes(4) + data)


def test_twelve_bits_are_scaled_from_twelve(tmp_path: Path) -> None:
    twelve_bits(tmp_path / "image.tif")
    with Image.open(tmp_path / "image.tif") as image:
        assert image.mode == "I;16"
        assert np.array_equal(np.asarray(eight_bits(image, "L")), RAMP)


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (Image.fromarray(RAMP.astype(np.int32) * 257), "its values are integers of 32 bits or with a sign"),
        (Image.fromarray(RAMP.astype(np.float32)), "its values are floats from 0 to 255; expected 0 to 1"),
        (Image.fromarray(np.float32(RAMP) - 1), "its values are floats from -1 to 254; expected 0 to 1"),
        (Image.fromarray(np.full((16, 16), np.nan, np.float32)), "its values are floats from nan to nan"),
    ],
)
def test_values_of_an_unknown_range_are_refused_everywhere(image: Image.Image, says: str, tmp_path: Path) -> None:
    file = folder_of(tmp_path, lambda path: image.save(path), "tif")
    with pytest.raises(DataError, match=rf"^{file} cannot be read as an image: {says}"):
        open_image(file, Data(name="folder"), (1, 16, 16))
    for in_memory in (True, False):
        with pytest.raises(DataError, match=rf"^{tmp_path}/train/[ab]/0\.tif cannot be read: {says}"):
            joined(opened((1, 16, 16), name="folder", root=str(tmp_path), in_memory=in_memory).train(0))


def test_torchvisions_folder_reads_them_the_same_way(tmp_path: Path) -> None:
    file = folder_of(tmp_path, lambda path: wide("I;16").save(path), "png")
    plain: dict[str, Any] = {"mean": [0.0], "std": [1.0]}
    data = opened((1, 16, 16), name="torch/folder", root=str(tmp_path), batch_size=4, **plain)
    wanted = open_image(file, Data(name="folder", **plain), (1, 16, 16))
    assert torch.equal(joined(data.validation())[0][0], wanted)
    assert len(wanted.unique()) == 256


def test_16_bit_images_are_learned_evaluated_and_predicted(tmp_path: Path) -> None:
    """Two classes that differ in brightness alone, which is gone where all is white."""
    for split, count in (("train", 8), ("validation", 4)):
        for name, level in (("dark", 9_000), ("light", 50_000)):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.random.default_rng(i).integers(level, level + 9_000, (16, 16), dtype=np.uint16)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.png")
    values = recipe(tmp_path)
    values["model"]["kwargs"] |= {"in_chans": 1, "num_classes": 2, "width": 0.5}
    values["training"] |= {"epochs": 10}
    result = train(values, output=tmp_path / "run")
    assert result.accuracy == evaluate(result.file, data_dir=tmp_path).accuracy == 1
    for name in ("dark", "light"):
        ((first, *_),) = predict(result.file, [tmp_path / "validation" / name / "0.png"])
        assert first[0] == name


# channels


@pytest.mark.parametrize("channels", [2, 5])
def test_other_numbers_of_channels_are_refused(channels: int, images: Path, tmp_path: Path) -> None:
    says = rf"^the network takes images of {channels} channels; image files give 1 \(grey\), 3 \(RGB\) or 4 \(RGBA\)"
    for name in ("folder", "torch/cifar10", "hfids/nowhere/nothing"):
        with pytest.raises(DataError, match=says):
            opened((channels, 16, 16), name=name, root=str(images))
    values = recipe(images)
    values["model"]["kwargs"]["in_chans"] = channels
    with pytest.raises(DataError, match=says):
        train(values, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(DataError, match=says):
        open_image(next(images.glob("*/*/*.png")), Data(name="folder"), (channels, 16, 16))


def test_a_network_of_four_channels_sees_transparency(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        for name, alpha in (("clear", 20), ("solid", 250)):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(6):
                pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 4), dtype=np.uint8)
                pixels[..., 3] = alpha
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.png")
    values = recipe(tmp_path)
    values["model"]["kwargs"] |= {"in_chans": 4, "num_classes": 2, "width": 0.5}
    values["training"] |= {"epochs": 10}
    result = train(values, output=tmp_path / "run")
    assert result.accuracy == 1
    assert predict(result.file, [tmp_path / "train" / "clear" / "0.png"])[0][0][0] == "clear"
    with pytest.raises(DataError, match=r"^data\.auto_augment is 'rand-m5-n2', and its operations take no images of 4"):
        train(values, overrides=["data.auto_augment=rand-m5-n2"], output=tmp_path / "augmented")


# damaged and hostile files


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = zlib.compress(bytes(1000))
    parts = ((b"IHDR", header), *chunks, (b"IDAT", body), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


HOSTILE = {
    "40,000 pixels a side": png(40_000, 40_000),
    "a huge text": png(8, 8, (b"zTXt", b"a\0\0" + zlib.compress(bytes(2_000_000)))),
    "a huge international text": png(8, 8, (b"iTXt", b"a\0\1\0\0\0" + zlib.compress(bytes(2_000_000)))),
    "no data": png(8, 8)[:40],
    "a folder": None,
    "nothing": b"",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_image_is_a_data_error(name: str, first: Any, tmp_path: Path, cli: Callable[..., Any]) -> None:
    file, content = tmp_path / "image.png", HOSTILE[name]
    if content is None:
        file.mkdir()
    else:
        file.write_bytes(content)
    outcome = cli("predict", first.file, file)
    assert outcome.status == 2
    assert re.fullmatch(rf"error: {file} cannot be read as an image: .*\n", outcome.err), outcome.err


def test_all_suffixes_are_those_of_formats_that_pillow_opens() -> None:
    Image.init()
    assert all(Image.registered_extensions()[suffix] in Image.OPEN for suffix in SUFFIXES)
