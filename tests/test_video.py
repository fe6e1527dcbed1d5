"""Video in and out: what is decoded, drawn and written, and what damaged or odd input does."""

import gc
import struct
import threading
import time
import wave
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image
from synthetic import write_gray_png

from hf_deformvos.video import (
    BackgroundWorker,
    H264Writer,
    VideoError,
    VideoReader,
    colorblind_palette,
    davis_palette,
    draw_overlay,
    mask_file_name,
    natural_key,
    prefetch,
    read_image,
    read_mask,
    read_palette_png,
    write_palette_png,
)
from hf_deformvos.video.reader import camera_target
from hf_deformvos.video_source_deformvos import open_source


HEIGHT, WIDTH = 48, 80


def make_frame(t: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Grey, with a red top left quarter and a blue bottom right one, whose brightness tells the frame."""
    frame = np.full((height, width, 3), 90, dtype=np.uint8)
    frame[: height // 2, : width // 2] = (200, 20, 20)
    frame[height // 2 :, width // 2 :] = (20, 20, 120 + 8 * (t % 16))
    return frame


def write_h264(path, num_frames: int = 8, timestamps=None, **size) -> None:
    with H264Writer(path, fps=25, crf=10) as writer:
        for t in range(num_frames):
            writer.write(make_frame(t, **size), None if timestamps is None else timestamps[t])


def write_raw(path, codec: str, pix_fmt: str, frames: list[np.ndarray], source_format: str, options=None) -> None:
    """A lossless file of any pixel format, through FFmpeg's own converter."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        for t, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format=source_format).reformat(format=pix_fmt)
            frame.pts, frame.time_base = t, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def set_display_matrix(path, matrix: tuple[int, int, int, int]) -> None:
    """Writes `a b c d` into the track header of an mp4, as phones do for a camera held upright or mirrored."""
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 4 + 40
    a, b, c, d = (value << 16 for value in matrix)
    data[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


def assert_close(image: np.ndarray, expected: np.ndarray, tolerance: float = 6.0) -> None:
    """Equal but for compression and chroma subsampling."""
    assert image.shape == expected.shape
    assert np.abs(image.astype(int) - expected.astype(int)).mean() < tolerance


# Reading files


def test_round_trip(tmp_path):
    write_h264(tmp_path / "clip.mp4")
    with VideoReader(tmp_path / "clip.mp4") as reader:
        info = reader.info
        frames = list(reader)
    assert (info.kind, info.width, info.height, info.num_frames) == ("file", WIDTH, HEIGHT, 8)
    assert info.fps == pytest.approx(25)
    assert info.seekable and info.codec == "h264"
    assert [frame.index for frame in frames] == list(range(8))
    np.testing.assert_allclose([frame.timestamp for frame in frames], np.arange(8) / 25, atol=1e-4)
    for t, frame in enumerate(frames):
        assert frame.image.dtype == np.uint8
        assert_close(frame.image, make_frame(t))
    assert not reader.truncated and reader.num_damaged == 0


def test_colors_survive_the_round_trip(tmp_path):
    """BT.709 is written and tagged, and must be read as such: BT.601 would shift a saturated green by ten and more."""
    image = np.zeros((64, 64, 3), dtype=np.uint8)
    image[:] = (30, 200, 40)
    with H264Writer(tmp_path / "clip.mp4", crf=1) as writer:
        writer.write(image)
    frame = next(iter(VideoReader(tmp_path / "clip.mp4"))).image
    assert np.abs(frame.astype(int) - image).max() <= 4


def test_file_can_be_read_twice(tmp_path):
    write_h264(tmp_path / "clip.mp4")
    reader = VideoReader(tmp_path / "clip.mp4")
    assert len(list(reader)) == len(list(reader)) == 8


def test_max_frames(tmp_path):
    write_h264(tmp_path / "clip.mp4")
    reader = VideoReader(tmp_path / "clip.mp4", max_frames=3)
    assert reader.info.num_frames == 3
    assert len(list(reader)) == 3
    assert not reader.truncated
    with pytest.raises(ValueError, match="max_frames"):
        VideoReader(tmp_path / "clip.mp4", max_frames=0)


@pytest.mark.parametrize(
    ("matrix", "turn"),
    [
        ((0, 1, -1, 0), lambda image: np.rot90(image, -1)),  # a quarter turn clockwise: a phone held upright
        ((0, -1, 1, 0), lambda image: np.rot90(image, 1)),
        ((-1, 0, 0, -1), lambda image: np.rot90(image, 2)),
        ((-1, 0, 0, 1), lambda image: image[:, ::-1]),  # a mirrored front camera
        ((0, 1, 1, 0), lambda image: image.swapaxes(0, 1)),
    ],
)
def test_display_matrix(tmp_path, matrix, turn):
    write_h264(tmp_path / "clip.mp4", num_frames=2)
    set_display_matrix(tmp_path / "clip.mp4", matrix)
    reader = VideoReader(tmp_path / "clip.mp4")
    frames = list(reader)
    expected = turn(make_frame(0))
    assert (reader.info.height, reader.info.width) == expected.shape[:2]
    assert_close(frames[0].image, expected)


def test_frames_are_let_go_once_read(tmp_path):
    write_h264(tmp_path / "clip.mp4", num_frames=40)
    gc.collect()
    gc.disable()
    try:
        with VideoReader(tmp_path / "clip.mp4", num_threads=1) as reader:
            assert sum(1 for _ in reader) == 40
        held = sum(isinstance(thing, av.VideoFrame) for thing in gc.get_objects())
    finally:
        gc.enable()
    assert held == 0


def test_variable_rate_timestamps(tmp_path):
    timestamps = [0.0, 0.04, 0.5, 0.52, 1.9, 2.0]
    write_h264(tmp_path / "clip.mp4", num_frames=6, timestamps=timestamps)
    frames = list(VideoReader(tmp_path / "clip.mp4"))
    np.testing.assert_allclose([frame.timestamp for frame in frames], timestamps, atol=1e-4)


def test_truncated_mp4_yields_what_decodes(tmp_path):
    path = tmp_path / "cut.mp4"
    noise = np.random.default_rng(0)
    with H264Writer(path, fps=25) as writer:
        for _ in range(20):
            writer.write(noise.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    reader = VideoReader(path)
    frames = list(reader)
    assert 0 < len(frames) < 20
    assert reader.truncated
    path.write_bytes(data)
    reader = VideoReader(path)
    assert len(list(reader)) == 20 and not reader.truncated


def test_truncated_matroska(tmp_path):
    noise = np.random.default_rng(0)
    frames = [noise.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8) for _ in range(50)]
    path = tmp_path / "cut.mkv"
    write_raw(path, "ffv1", "bgr0", frames, "rgb24")
    data = path.read_bytes()
    reader = VideoReader(path)
    assert len(list(reader)) == 50 and not reader.truncated
    path.write_bytes(data[: len(data) // 2])
    reader = VideoReader(path)
    assert 0 < len(list(reader)) < 50
    assert reader.truncated


@pytest.mark.parametrize("suffix", [".mkv", ".webm"])
def test_slow_matroska_is_whole(suffix, tmp_path):
    path, codec = tmp_path / f"slow{suffix}", "ffv1" if suffix == ".mkv" else "libvpx-vp9"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=1)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        for t in range(4):
            frame = av.VideoFrame.from_ndarray(make_frame(t), format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = t, Fraction(1, 1)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    reader = VideoReader(path)
    assert len(list(reader)) == 4 and not reader.truncated


def test_corrupt_bytes_in_the_middle(tmp_path):
    path = tmp_path / "clip.mp4"
    write_h264(path, num_frames=30)
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat") + 4 + (len(data) - data.index(b"mdat")) // 2
    data[start : start + 60] = bytes(60)
    path.write_bytes(data)
    reader = VideoReader(path)
    assert len(list(reader)) > 5


@pytest.mark.parametrize("codec", ["libx264", "mpeg2video"])
def test_a_stream_that_starts_between_key_frames_is_not_damaged(tmp_path, codec):
    whole, path = tmp_path / "whole.ts", tmp_path / "recorded.ts"
    with av.open(str(whole), "w") as container:
        stream = container.add_stream(codec, rate=25, options={"g": "10"})
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        for t in range(40):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(make_frame(t)).reformat(format="yuv420p")))
        container.mux(stream.encode(None))
    with av.open(str(whole)) as source, av.open(str(path), "w") as target:
        copied = target.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(source.demux(source.streams.video[0])):
            if number >= 3 and packet.size:
                packet.stream = copied
                target.mux(packet)
    reader = VideoReader(path)
    assert 20 < len(list(reader)) < 40
    assert reader.num_damaged == 0 and not reader.truncated


@pytest.mark.parametrize(
    ("codec", "pix_fmt", "suffix"),
    [
        ("ffv1", "gray", ".mkv"),
        ("ffv1", "gray16le", ".mkv"),
        ("ffv1", "yuv420p10le", ".mkv"),
        ("ffv1", "bgr0", ".mkv"),
        ("mjpeg", "yuvj420p", ".avi"),
    ],
)
@pytest.mark.parametrize(("height", "width"), [(48, 80), (47, 79)])
def test_pixel_formats_and_odd_sizes(tmp_path, codec, pix_fmt, suffix, height, width):
    path = tmp_path / f"clip{suffix}"
    frames = [make_frame(t, height, width) for t in range(3)]
    write_raw(path, codec, pix_fmt, frames, "rgb24")
    decoded = list(VideoReader(path))
    assert len(decoded) == 3
    expected = frames[0]
    if pix_fmt.startswith("gray"):
        assert (decoded[0].image == decoded[0].image[..., :1]).all()
        expected = np.asarray(Image.fromarray(expected).convert("L").convert("RGB"))
    assert_close(decoded[0].image, expected)


def test_alpha_is_laid_over_black(tmp_path):
    rgba = np.zeros((HEIGHT, WIDTH, 4), dtype=np.uint8)
    rgba[..., 0] = 200
    rgba[:, : WIDTH // 2, 3] = 255
    write_raw(tmp_path / "clip.mov", "png", "rgba", [rgba], "rgba")
    image = next(iter(VideoReader(tmp_path / "clip.mov"))).image
    assert image.shape == (HEIGHT, WIDTH, 3)
    assert (image[:, : WIDTH // 2, 0] == 200).all()
    assert (image[:, WIDTH // 2 :] == 0).all()


@pytest.mark.parametrize("codec", ["libvpx", "libvpx-vp9"])
def test_alpha_of_webm_is_laid_over_black(tmp_path, codec):
    rgba = np.full((HEIGHT, WIDTH, 4), 200, dtype=np.uint8)
    rgba[:, : WIDTH // 2, 3], rgba[:, WIDTH // 2 :, 3] = 255, 0
    write_raw(tmp_path / "clip.webm", codec, "yuva420p", [rgba] * 3, "rgba", {"auto-alt-ref": "0"})
    frames = list(VideoReader(tmp_path / "clip.webm"))
    assert len(frames) == 3
    assert frames[2].image[:, : WIDTH // 2 - 8].min() > 180
    assert frames[2].image[:, WIDTH // 2 + 8 :].max() < 20


def test_frames_that_change_size_are_an_error(tmp_path):
    for t, width in enumerate((80, 80, 64)):
        Image.fromarray(make_frame(0, HEIGHT, width)).save(tmp_path / f"{t}.png")
    reader = VideoReader(tmp_path)
    seen = []
    with pytest.raises(VideoError, match=r"changes size at frame 2: 64x48 after 80x48"):
        for frame in reader:
            seen.append(frame.index)
    assert seen == [0, 1]


# What is no video


def test_audio_only(tmp_path):
    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(16000))
    with pytest.raises(VideoError, match=r"sound\.wav has no video stream \(found: audio\)"):
        VideoReader(tmp_path / "sound.wav")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.mp4", b"", r"empty\.mp4 is empty"),
        ("noise.mp4", b"\x00\x01\x02" * 500, r"noise\.mp4 is not a video"),
        ("notes.txt", b"just words\n" * 50, r"notes\.txt (has no video stream|is not a video)"),
    ],
)
def test_not_a_video(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(VideoError, match=message):
        VideoReader(tmp_path / name)


def test_missing_index_of_a_cut_mp4(tmp_path):
    """Without faststart the index lies at the end: a cut file cannot be opened at all, and the message says so."""
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for t in range(5):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(make_frame(t))))
        container.mux(stream.encode(None))
    data = (tmp_path / "clip.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: data.index(b"moov") - 20])
    with pytest.raises(VideoError, match=r"cut\.mp4 is not a video that FFmpeg can read .*is it complete"):
        VideoReader(tmp_path / "cut.mp4")


def test_missing_file_and_folder_without_images(tmp_path):
    with pytest.raises(VideoError, match=r"gone\.mp4 does not exist; pass .* or a camera number\."):
        VideoReader(tmp_path / "gone.mp4")
    with pytest.raises(VideoError, match="holds no images"):
        VideoReader(tmp_path)


@pytest.mark.parametrize("name", ["gone.mp4", "noise.mp4"])
def test_where_no_camera_is_taken_none_is_proposed(tmp_path, name):
    (tmp_path / "noise.mp4").write_bytes(b"\x00\x01\x02" * 500)
    with pytest.raises(VideoError, match=r"[Pp]ass a video file or a folder of images\."):
        next(open_source(str(tmp_path / name)).frames())


def test_camera_names():
    assert camera_target("0", "linux") == ("/dev/video0", "v4l2")
    assert camera_target("camera:2", "linux") == ("/dev/video2", "v4l2")
    assert camera_target("/dev/video1", "linux") == ("/dev/video1", "v4l2")
    assert camera_target("camera:1", "darwin") == ("1:none", "avfoundation")
    assert camera_target("camera:Integrated Camera", "win32") == ("video=Integrated Camera", "dshow")
    with pytest.raises(VideoError, match="has no number on Windows"):
        camera_target("0", "win32")


def test_camera_that_is_not_there():
    with pytest.raises(VideoError, match=r"camera 97 cannot be opened .* Pass another number"):
        VideoReader("camera:97")


def test_camera_streams_once_and_is_never_truncated(tmp_path, monkeypatch):
    """A file behind the camera's name stands in for the device: everything but FFmpeg's capture is real."""
    write_h264(tmp_path / "clip.mp4")
    monkeypatch.setattr(
        "hf_deformvos.video.reader.camera_target", lambda source, platform: (str(tmp_path / "clip.mp4"), "mp4")
    )
    reader = VideoReader("camera:0")
    assert reader.info.kind == "camera" and not reader.info.seekable
    frames = list(reader)
    # Frames that nobody fetches in time are dropped, so that what is segmented is now, not then.
    assert 1 <= len(frames) <= 8
    assert not reader.truncated
    with pytest.raises(VideoError, match="can be read only once"):
        list(reader)


def test_frames_that_a_camera_drops_do_not_count(tmp_path, monkeypatch):
    write_h264(tmp_path / "clip.mp4")
    monkeypatch.setattr(
        "hf_deformvos.video.reader.camera_target", lambda source, platform: (str(tmp_path / "clip.mp4"), "mp4")
    )
    indices = []
    for frame in VideoReader("camera:0", max_frames=2, num_prefetch=1):
        indices.append(frame.index)
        time.sleep(0.3)  # until the decoder is at the end
    assert len(indices) == 2 and indices[1] > 1


# Folders of images


def test_folder_in_natural_order(tmp_path):
    for number in (10, 2, 1, 33):
        Image.fromarray(np.full((8, 12, 3), number, dtype=np.uint8)).save(tmp_path / f"frame{number}.png")
    (tmp_path / "notes.txt").write_text("not a frame")
    (tmp_path / ".hidden.png").write_bytes(b"")
    reader = VideoReader(tmp_path)
    frames = list(reader)
    assert [frame.name for frame in frames] == ["frame1.png", "frame2.png", "frame10.png", "frame33.png"]
    assert [int(frame.image[0, 0, 0]) for frame in frames] == [1, 2, 10, 33]
    assert (reader.info.kind, reader.info.num_frames, reader.info.fps) == ("folder", 4, 24.0)
    assert len(list(reader)) == 4


def test_natural_key():
    names = ["b1", "a10", "a2", "A1", "10", "9", "a2b10", "a2b9"]
    assert sorted(names, key=natural_key) == ["9", "10", "A1", "a2", "a2b9", "a2b10", "a10", "b1"]


def test_images_of_every_kind(tmp_path):
    image = make_frame(0)
    Image.fromarray(image).save(tmp_path / "a.webp", lossless=True)
    np.testing.assert_array_equal(read_image(tmp_path / "a.webp"), image)
    Image.fromarray(image[..., 0]).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(read_image(tmp_path / "grey.png"), np.repeat(image[..., :1], 3, axis=2))
    Image.fromarray(image[..., 0].astype(np.uint16) * 256).save(tmp_path / "grey16.png")
    np.testing.assert_array_equal(read_image(tmp_path / "grey16.png"), np.repeat(image[..., :1], 3, axis=2))
    rgba = np.dstack([image, np.full((HEIGHT, WIDTH), 255, dtype=np.uint8)])
    rgba[:10, :, 3] = 0
    Image.fromarray(rgba).save(tmp_path / "alpha.png")
    assert (read_image(tmp_path / "alpha.png")[:10] == 0).all()
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    Image.fromarray(image).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "turned.png"), np.rot90(image, -1))


def test_damaged_image_names_the_file(tmp_path):
    Image.fromarray(make_frame(0)).save(tmp_path / "0.png")
    (tmp_path / "1.png").write_bytes((tmp_path / "0.png").read_bytes()[:60])
    with pytest.raises(VideoError, match=r"1\.png is not an image that can be read"):
        list(VideoReader(tmp_path))


# Threads


def test_prefetch_keeps_order_and_is_bounded():
    produced = []

    def produce():
        for number in range(20):
            produced.append(number)
            yield number

    items = prefetch(produce(), depth=3)
    assert next(items) == 0
    deadline = time.monotonic() + 5
    while len(produced) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(produced) <= 6  # one handed out, three waiting, one or two in the producer's hand
    assert list(items) == list(range(1, 20))


def test_prefetch_raises_after_what_came_before_and_stops_its_thread():
    def produce():
        yield 1
        yield 2
        raise ValueError("broken source")

    seen = []
    with pytest.raises(ValueError, match="broken source"):
        for item in prefetch(produce(), depth=4):
            seen.append(item)
    assert seen == [1, 2]
    items = prefetch(iter(range(1000)), depth=2)
    next(items)
    items.close()
    assert not any(thread.name == "deformvos-prefetch" for thread in threading.enumerate())


def test_a_source_that_stalls_holds_nobody_up(monkeypatch):
    monkeypatch.setattr("hf_deformvos.video.pipeline._PATIENCE_SECONDS", 0.2)
    stalled, released = threading.Event(), threading.Event()

    def produce():
        yield 1
        stalled.set()
        released.wait(30)

    items = prefetch(produce(), depth=1)
    assert next(items) == 1 and stalled.wait(10)
    items.close()
    assert not released.is_set()
    released.set()


def test_worker_runs_in_order_and_reports_its_error():
    done = []
    worker = BackgroundWorker(done.append, depth=2)
    for number in range(50):
        worker.submit(number)
    worker.close()
    assert done == list(range(50))

    def fail(number):
        if number == 3:
            raise OSError("disk full")
        done.append(number)

    worker = BackgroundWorker(fail, depth=2)
    with pytest.raises(OSError, match="disk full"):
        for number in range(50):
            worker.submit(number)
    worker.close()


# Masks as files


def test_palette_png_equals_ids_and_palette(tmp_path):
    ids = np.arange(256, dtype=np.int32).reshape(16, 16)
    path = tmp_path / mask_file_name(7)
    assert path.name == "00007.png"
    write_palette_png(path, ids)
    with Image.open(path) as image:
        assert image.mode == "P"
        np.testing.assert_array_equal(np.array(image), ids)
        np.testing.assert_array_equal(np.reshape(image.getpalette(), (-1, 3)), davis_palette())
    np.testing.assert_array_equal(read_palette_png(path), ids)
    assert [file.name for file in tmp_path.iterdir()] == ["00007.png"]
    with pytest.raises(ValueError, match="ids from 0 to 255"):
        write_palette_png(path, ids + 1)


def test_davis_palette_known_colors():
    palette = davis_palette()
    assert palette[:5].tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128]]
    assert palette[9].tolist() == [192, 0, 0]
    assert palette[255].tolist() == [224, 224, 192]
    assert len(np.unique(palette, axis=0)) == 256


def test_read_mask_kinds(tmp_path, caplog):
    ids = np.zeros((20, 30), dtype=np.uint8)
    ids[2:8, 2:8], ids[10:18, 10:25] = 1, 2

    def check(image, expected, name="mask.png"):
        image.save(tmp_path / name)
        np.testing.assert_array_equal(read_mask(tmp_path / name), expected)

    palette_image = Image.fromarray(ids)
    palette_image.putpalette(colorblind_palette().tobytes())
    check(palette_image, ids)
    check(Image.fromarray(ids * 7), ids * 7)
    check(Image.fromarray(ids.astype(np.uint16)), ids)
    binary = (ids > 0).astype(np.uint8)
    check(Image.fromarray(binary * 255), binary)
    check(Image.fromarray(binary.astype(bool)), binary)
    check(Image.fromarray(np.repeat(binary[..., None] * 255, 3, axis=2)), binary)
    # Colours of the DAVIS palette keep their ids, whatever their order.
    check(Image.fromarray(davis_palette()[ids * 3]), ids * 3)
    # Others are numbered by ascending (red, green, blue): blue before red.
    colors = np.array([[0, 0, 0], [255, 0, 0], [0, 0, 255]], dtype=np.uint8)
    check(Image.fromarray(colors[ids]), np.array([0, 2, 1])[ids])
    # Transparent is background.
    rgba = np.dstack([np.broadcast_to(colors[2], (20, 30, 3)), (ids == 1) * np.uint8(255)])
    check(Image.fromarray(rgba), ids == 1)
    # 255 beside ids is void.
    check(Image.fromarray(np.where(ids == 2, 255, ids).astype(np.uint8)), ids * (ids == 1))
    # Pillow stretches grays of few bits: ids 1 to 3 become 85, 170 and the void 255.
    for bits in (2, 4):
        for values, expected in ((ids + ids // 2, ids + ids // 2), (binary * (2**bits - 1), binary)):
            write_gray_png(tmp_path / "few.png", values, bits)
            np.testing.assert_array_equal(read_mask(tmp_path / "few.png"), expected)


def test_read_mask_of_another_size(tmp_path):
    ids = np.zeros((20, 30), dtype=np.uint8)
    ids[:10] = 3
    write_palette_png(tmp_path / "mask.png", ids)
    resized = read_mask(tmp_path / "mask.png", (40, 60))
    assert resized.shape == (40, 60)
    assert (resized[:20] == 3).all() and (resized[20:] == 0).all()
    ids[:] = 0
    ids[0, 0] = 1
    write_palette_png(tmp_path / "small.png", ids)
    with pytest.raises(ValueError, match="object 1 vanishes when resized to 3x2"):
        read_mask(tmp_path / "small.png", (2, 3))


def test_read_mask_warns_of_what_covers_everything(tmp_path, warnings_of_package):
    ids = np.ones((5, 5), dtype=np.uint8)
    ids[0, 0] = 0
    Image.fromarray(ids * 255).save(tmp_path / "most.png")
    Image.fromarray(np.full((5, 5), 255, dtype=np.uint8)).save(tmp_path / "all.png")
    assert read_mask(tmp_path / "most.png").sum() == 24 and warnings_of_package.text == ""
    assert (read_mask(tmp_path / "all.png") == 1).all()
    assert "all.png is object 1 everywhere: were object and background exchanged?" in warnings_of_package.text


def test_read_mask_errors(tmp_path):
    Image.fromarray(np.zeros((5, 5), dtype=np.uint8)).save(tmp_path / "empty.png")
    with pytest.raises(ValueError, match=r"empty\.png is empty: .* paint each object"):
        read_mask(tmp_path / "empty.png")
    shades = np.arange(250, dtype=np.uint8).reshape(10, 25)
    Image.fromarray(shades).save(tmp_path / "soft.png")
    with pytest.raises(ValueError, match="one flat value for each object, got 250"):
        read_mask(tmp_path / "soft.png")
    Image.fromarray(np.full((5, 5), 300, dtype=np.uint16)).save(tmp_path / "large.png")
    with pytest.raises(ValueError, match="ids from 1 to 255, got 300"):
        read_mask(tmp_path / "large.png")
    with pytest.raises(ValueError, match=r"gone\.png does not exist"):
        read_mask(tmp_path / "gone.png")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match=r"text\.png is not an image"):
        read_mask(tmp_path / "text.png")


# Drawing and video out


def test_overlay_fills_and_outlines():
    image = np.full((40, 60, 3), 100, dtype=np.uint8)
    ids = np.zeros((40, 60), dtype=np.int32)
    ids[10:30, 10:30] = 1
    ids[10:30, 30:50] = 2
    palette = davis_palette()
    drawn = draw_overlay(image, ids, opacity=0.5)
    assert (image == 100).all()
    assert (drawn[ids == 0] == 100).all()
    assert drawn[20, 20].tolist() == [114, 50, 50]
    assert drawn[20, 10].tolist() == palette[1].tolist()
    assert drawn[20, 29].tolist() == palette[1].tolist()
    assert drawn[20, 30].tolist() == palette[2].tolist()
    # An object that reaches the frame's border is not outlined there.
    whole = draw_overlay(image, np.ones_like(ids))
    assert (whole == [114, 50, 50]).all()
    np.testing.assert_array_equal(draw_overlay(image, np.zeros_like(ids)), image)
    with pytest.raises(ValueError, match="the frame's size"):
        draw_overlay(image, ids[:20])
    with pytest.raises(ValueError, match="opacity"):
        draw_overlay(image, ids, opacity=1.5)


def test_colorblind_palette_has_no_repeats_up_to_21():
    palette = colorblind_palette()
    assert palette.shape == (256, 3) and palette[0].tolist() == [0, 0, 0]
    assert len(np.unique(palette[:22], axis=0)) == 22


@pytest.mark.parametrize(("height", "width"), [(48, 80), (47, 79), (1, 1)])
def test_h264_is_what_browsers_play(tmp_path, height, width):
    path = tmp_path / "clip.mp4"
    write_h264(path, num_frames=3, height=height, width=width)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert (stream.height, stream.width) == (height + height % 2, width + width % 2)
        assert len(list(container.decode(stream))) == 3
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # the index first: playback starts before the download ends
    assert [file.name for file in tmp_path.iterdir()] == ["clip.mp4"]


def test_h264_pads_without_moving_the_picture(tmp_path):
    write_h264(tmp_path / "clip.mp4", num_frames=1, height=47, width=79)
    image = next(iter(VideoReader(tmp_path / "clip.mp4"))).image
    assert_close(image[:47, :79], make_frame(0, 47, 79))


def test_h264_last_frame_has_its_duration(tmp_path):
    write_h264(tmp_path / "clip.mp4", num_frames=3, timestamps=[0.0, 1.0, 2.0])
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert container.duration / 1e6 == pytest.approx(2.04, abs=0.02)


@pytest.mark.parametrize("fps", [1 / 3600, 1 / 86400, 1e-300, 1e5, float("inf")])
@pytest.mark.parametrize("timed", [True, False])
def test_h264_of_any_rate(tmp_path, fps, timed):
    timestamps = [t / fps for t in range(8)] if timed and fps > 1e-9 else None
    with H264Writer(tmp_path / "clip.mp4", fps=fps) as writer:
        for t in range(8):
            writer.write(make_frame(t), None if timestamps is None else timestamps[t])
    frames = list(VideoReader(tmp_path / "clip.mp4"))
    assert len(frames) == 8
    if fps == 1 / 3600:
        assert [frame.timestamp for frame in frames] == [t * 3600 for t in range(8)]


def test_h264_stands_timestamps_that_do_not_advance(tmp_path):
    write_h264(tmp_path / "clip.mp4", num_frames=4, timestamps=[0.0, 0.0, -1.0, 0.5])
    assert len(list(VideoReader(tmp_path / "clip.mp4"))) == 4


def test_h264_is_playable_after_an_error(tmp_path):
    with pytest.raises(KeyboardInterrupt), H264Writer(tmp_path / "clip.mp4") as writer:
        for t in range(5):
            writer.write(make_frame(t))
        raise KeyboardInterrupt
    assert len(list(VideoReader(tmp_path / "clip.mp4"))) == 5


def test_h264_errors(tmp_path):
    with pytest.raises(ValueError, match=r"rename it to \.mp4"):
        H264Writer(tmp_path / "clip.avi")
    with H264Writer(tmp_path / "clip.mp4") as writer:
        writer.write(make_frame(0))
        with pytest.raises(ValueError, match="first one's size"):
            writer.write(make_frame(0, 30, 30))
    with H264Writer(tmp_path / "none.mp4"):
        pass
    assert not (tmp_path / "none.mp4").exists()
