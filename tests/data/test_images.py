"""load_image: every kind of picture becomes RGB, every broken one a BadRow that names it."""

import http.server
import threading
from io import BytesIO

import numpy as np
import psutil
import pytest
from PIL import Image, ImageFile

from vlm_taid.data import images, load_image
from vlm_taid.errors import BadRow

ROW = "train.jsonl:3"


def noise(width=24, height=16, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(image, kind="PNG", **options):
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_path_bytes_dict_and_image_give_the_same_picture(tmp_path):
    pixels = noise()
    content = encoded(Image.fromarray(pixels))
    (tmp_path / "a").mkdir()
    (tmp_path / "a/b.png").write_bytes(content)
    absolute = str(tmp_path / "a/b.png")
    for value in (
        "a/b.png",
        absolute,
        content,
        {"bytes": content, "path": "elsewhere.png"},
        {"bytes": None, "path": "a/b.png"},
        Image.open(tmp_path / "a/b.png"),
    ):
        image = load_image(value, tmp_path, ROW)
        assert image.mode == "RGB" and type(image) is Image.Image
        assert np.array_equal(np.asarray(image), pixels)


def test_transparency_goes_on_white(tmp_path):
    rgba = np.zeros((4, 4, 4), dtype=np.uint8)
    rgba[:2, :, 0], rgba[:2, :, 3] = 200, 255
    rgba[2, :, 3] = 51
    expected = [(200, 0, 0), (204, 204, 204), (255, 255, 255)]
    image = load_image(encoded(Image.fromarray(rgba)), tmp_path, ROW)
    assert [image.getpixel((0, y)) for y in (0, 2, 3)] == expected

    grey_alpha = Image.fromarray(rgba).convert("LA")
    assert load_image(encoded(grey_alpha), tmp_path, ROW).getpixel((0, 3)) == (255, 255, 255)

    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.putpixel((1, 0), 1)
    image = load_image(encoded(palette, transparency=0), tmp_path, ROW)
    assert image.getpixel((0, 0)) == (255, 255, 255) and image.getpixel((1, 0)) == (10, 20, 30)
    assert load_image(encoded(palette), tmp_path, ROW).getpixel((0, 0)) == (0, 0, 0)


def test_cmyk_and_bilevel(tmp_path):
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    red, green, blue = load_image(encoded(cmyk, "JPEG", quality=95), tmp_path, ROW).getpixel((8, 8))
    assert red > 240 and green < 15 and blue < 15
    assert load_image(encoded(Image.new("1", (3, 3), 1)), tmp_path, ROW).getpixel((1, 1)) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled(tmp_path, kind):
    values = np.array([[0, 257, 128 * 257, 65535]], dtype=np.uint16)
    image = load_image(encoded(Image.fromarray(values), kind), tmp_path, ROW)
    assert [pixel[0] for pixel in image.get_flattened_data()] == [0, 1, 128, 255]


def test_animation_gives_the_first_frame(tmp_path):
    frames = [Image.new("RGB", (5, 5), colour) for colour in ("red", "blue")]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert load_image(content, tmp_path, ROW).getpixel((2, 2)) == (255, 0, 0)


def test_exif_rotation_is_applied_once(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    pixels = noise(24, 16)
    image = load_image(encoded(Image.fromarray(pixels), exif=exif), tmp_path, ROW)
    assert np.array_equal(np.asarray(image), np.rot90(pixels, -1))
    assert not image.getexif() and not image.info


def test_broken_exif_leaves_the_picture(tmp_path):
    pixels = noise()
    content = encoded(Image.fromarray(pixels), exif=b"Exif\x00\x00no tiff header at all")
    assert np.array_equal(np.asarray(load_image(content, tmp_path, ROW)), pixels)


def refused(value, folder, **options):
    with pytest.raises(BadRow) as caught:
        load_image(value, folder, ROW, **options)
    assert str(caught.value).startswith(f"{ROW}: image ")
    return str(caught.value)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000"])
def test_truncated(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # what another library may have left behind
    content = encoded(Image.fromarray(noise(64, 64)), kind)
    (tmp_path / "half.img").write_bytes(content[: len(content) // 2])
    message = refused("half.img", tmp_path)
    assert "'half.img'" in message and ("truncated" in message or "damaged" in message)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


@pytest.mark.parametrize("side", [15, 40])  # Pillow warns above the limit, and raises above twice the limit
def test_decompression_bomb(tmp_path, side, monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 200)
    picture = Image.new("RGB", (side, side))
    picture.save(tmp_path / "bomb.png")
    assert "decompression bomb" in refused("bomb.png", tmp_path)
    assert "decompression bomb" in refused(picture, tmp_path)
    monkeypatch.setattr(images, "MAX_PIXELS", 2000)
    assert load_image("bomb.png", tmp_path, ROW).size == (side, side)


def test_paths_stay_under_the_root(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "circle.png").symlink_to(root / "circle.png")
    (root / "folder.png").mkdir()
    for value in ("../secret.png", str(tmp_path / "secret.png"), "link.png"):
        assert "outside the data root" in refused(value, root)
    for value in ("missing.png", "folder.png", ""):
        assert "no such file" in refused(value, root)
    for value in ("circle.png", "nul\0l.png", "n" * 300):
        refused(value, root)
    (tmp_path / "alias").symlink_to(root)
    Image.new("RGB", (4, 4)).save(root / "in.png")
    assert load_image("in.png", tmp_path / "alias", ROW).size == (4, 4)


def test_other_bad_values(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    assert "is not a picture" in refused("text.png", tmp_path)
    assert "is not a picture" in refused(b"", tmp_path)
    assert "is not a picture" in refused(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", tmp_path)
    assert "expected a path" in refused(7, tmp_path)
    assert "expected a path" in refused({"bytes": None, "path": None}, tmp_path)
    assert "empty" in refused(Image.new("RGB", (0, 5)), tmp_path)
    assert "float" in refused(encoded(Image.new("F", (2, 2), 0.5), "TIFF"), tmp_path)
    assert "16 bits" in refused(Image.fromarray(np.full((2, 2), 70_000, dtype=np.int32)), tmp_path)
    zero = encoded(Image.new("RGB", (4, 4)))
    refused(zero[:16] + b"\0\0\0\0" + zero[20:], tmp_path)


def test_no_file_stays_open(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes((tmp_path / "good.png").read_bytes()[:40])
    process = psutil.Process()
    before = process.num_fds()
    kept = [load_image("good.png", tmp_path, ROW) for _ in range(5)]
    for _ in range(5):
        refused("bad.png", tmp_path)
    assert len(kept) == 5 and process.num_fds() == before


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    Image.new("RGB", (4, 4), "red").save(tmp_path / "red.png")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(tmp_path))

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_urls(tmp_path, server, monkeypatch):
    url = f"{server}/red.png"
    assert "allow_urls" in refused(url, tmp_path)
    assert load_image(url, tmp_path, ROW, allow_urls=True).getpixel((0, 0)) == (255, 0, 0)
    assert "404" in refused(f"{server}/none.png", tmp_path, allow_urls=True)
    for value in (f"file://{tmp_path}/red.png", "ftp://127.0.0.1/red.png", "data:image/png;base64,AAAA"):
        assert "only paths and http" in refused(value, tmp_path, allow_urls=True)
    monkeypatch.setattr(images, "MAX_URL_BYTES", 10)
    assert "larger than 10 bytes" in refused(url, tmp_path, allow_urls=True)
