"""Every kind of video file and frame folder gives the frame asked for, the right way up; hostile ones cost nothing."""

import os
import socket
import struct
import subprocess
import sys
import zipfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from common.data import video
from common.data.picture import Unreadable
from common.run import ROOT

FRAMES = 40
# name: codec, options of the codec, of the container. Key frames are near one another, so that there is one to start
# from, and B-frames are stored out of order.
X264 = {"x264-params": "keyint=12:bframes=3:b-adapt=0:crf=10"}
MPEG = {"g": "12", "bf": "2", "b": "2M"}
KINDS = {
    "b_frames.mp4": ("libx264", X264, {}),
    "open_gop.mp4": ("libx264", {"x264-params": "keyint=12:bframes=3:b-adapt=0:open-gop=1:crf=10"}, {}),
    "intra_refresh.mp4": ("libx264", {"x264-params": "keyint=20:intra-refresh=1"}, {}),
    "fragmented.mp4": ("libx264", X264, {"movflags": "frag_keyframe+empty_moov"}),
    "h264.mov": ("libx264", X264, {}),
    "h264.mkv": ("libx264", X264, {}),
    "h264.flv": ("libx264", X264, {}),
    "h264.ts": ("libx264", X264, {}),
    "h264.mpg": ("libx264", X264, {}),
    "h264.avi": ("libx264", X264, {}),
    "hevc.mp4": ("libx265", {"preset": "ultrafast", "x265-params": "keyint=12:bframes=3:log-level=none"}, {}),
    "mpeg1.mpg": ("mpeg1video", MPEG, {}),
    "mpeg2.vob": ("mpeg2video", MPEG, {}),
    "mpeg2.ts": ("mpeg2video", MPEG, {}),
    "mpeg2.m2ts": ("mpeg2video", MPEG, {}),
    "mpeg4.avi": ("mpeg4", {"g": "12"}, {}),
    "mpeg4_b.avi": ("mpeg4", MPEG, {}),
    "mpeg4_b.mp4": ("mpeg4", MPEG, {}),
    "vp8.webm": ("libvpx", {"g": "12", "auto-alt-ref": "1", "lag-in-frames": "8", "cpu-used": "8"}, {}),
    "vp9.webm": ("libvpx-vp9", {"g": "12", "auto-alt-ref": "1", "lag-in-frames": "8", "cpu-used": "8"}, {}),
    "av1.mp4": ("libsvtav1", {"g": "12", "preset": "12"}, {}),
    "wmv2.wmv": ("wmv2", {"g": "12"}, {}),
    "every_frame_a_key.mov": ("mjpeg", {}, {}),
    "animation.gif": ("gif", {}, {}),
}


def textured(count: int, height: int = 64, width: int = 96) -> list[np.ndarray]:
    """A moving pattern whose mean, 4 i + 40, tells frame i's number."""
    pattern = np.kron(np.random.default_rng(0).integers(0, 41, (height // 8, width // 8, 1)), np.ones((8, 8, 3)))
    pattern -= pattern.mean()
    return [(np.roll(pattern, 2 * i, axis=1) + 40 + 4 * i).round().astype(np.uint8) for i in range(count)]


def numbers(frames: np.ndarray) -> list[int]:
    return [round((frame.mean() - 40) / 4) for frame in frames.astype(float)]


def encode(path: Path, codec: str = "libx264", options=None, container=None, frames=None, prepare=None) -> Path:
    """Writes a video; `prepare` may change its stream first."""
    frames = textured(FRAMES) if frames is None else frames
    formats = {".m2ts": "mpegts", ".vob": "vob"}
    with av.open(str(path), "w", format=formats.get(path.suffix), options=container or {}) as out:
        stream = out.add_stream(codec, rate=25, options=options or {})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = {"gif": "rgb8", "mjpeg": "yuvj420p"}.get(codec, "yuv420p")
        stream.codec_context.thread_count = 1
        if prepare:
            prepare(stream)
        for frame in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode())
    return path


def plainly(path: Path) -> np.ndarray:
    """What the decoder gives from the start to the end."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file(tmp_path, kind):
    path = encode(tmp_path / kind, *KINDS[kind])
    every = plainly(path)
    assert len({frame.tobytes() for frame in every}) == FRAMES, "no two frames are alike"
    rng = np.random.default_rng(0)
    strides = [rng.integers(12) + stride * np.arange(7) for stride in (1, 2, 3, 4, 5)]
    with video.open_video(path) as opened:
        assert len(opened) == FRAMES
        for indices in ([0], [FRAMES - 1], [13, 12, 11], *rng.integers(FRAMES, size=(4, 3)), *strides):
            assert np.array_equal(opened.read(indices), every[indices]), f"frames {indices} differ from a plain decode"
        assert all(np.array_equal(*pair) for pair in zip(opened, every, strict=True))


def test_frames_that_nobody_needs_are_not_decoded(tmp_path):
    """Of 13 packets up to the one asked for, the B-frames in between, and what follows, are left out."""
    path = encode(tmp_path / "b.mp4", *KINDS["b_frames.mp4"])
    with video.open_video(path) as opened:
        given = list(opened._decode({11}, 0))
        assert 11 in [number for number, _ in given] and len(given) < 8
        assert len(list(opened._decode({0, 38}, 0))) < 8, "what lies between two runs is passed over"


@pytest.mark.parametrize("turn", [0, 90, 180, 270])
@pytest.mark.parametrize("mirror", [False, True])
def test_a_phones_video_stands_upright(tmp_path, turn, mirror):
    """The display matrix as a phone writes it: clockwise by `turn`, and for a front camera mirrored first."""
    frame = np.zeros((64, 96, 3), np.uint8)
    frame[:32, :48] = 200  # the top left corner is light, as the sensor sees it
    frame[32:, :48] = 100
    right = {0: (1, 0, 0, 1), 90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[turn]
    a, b, c, d = (-right[0], -right[1], right[2], right[3]) if mirror else right
    one, matrix = 1 << 16, [0] * 9
    matrix[0], matrix[1], matrix[3], matrix[4], matrix[8] = a * one, b * one, c * one, d * one, 1 << 30
    path = encode(
        tmp_path / "phone.mp4", frames=[frame] * 3, prepare=lambda stream: stream.set_display_matrix(matrix)
    )
    expected = np.rot90(frame[:, ::-1] if mirror else frame, -turn // 90)
    with video.open_video(path) as opened:
        seen = opened.read([0, 2])
        assert seen.shape[1:] == expected.shape and np.abs(seen.astype(int) - expected).mean() < 4
        assert mirror or opened.rotation == turn


def test_a_trim_with_an_edit_list(tmp_path):
    """`ffmpeg -ss -c copy` and phones keep frames from the key frame on and hide those before the cut."""
    source, trimmed = encode(tmp_path / "whole.mp4", *KINDS["b_frames.mp4"]), tmp_path / "trim.mp4"
    with av.open(str(source)) as given, av.open(str(trimmed), "w") as out:
        stream = given.streams.video[0]
        copy = out.add_stream_from_template(stream)
        cut = round(Fraction(17, 25) / stream.time_base)
        for packet in given.demux(stream):
            if packet.size and packet.pts * stream.time_base * 25 >= 12:
                packet.pts, packet.dts, packet.stream = packet.pts - cut, packet.dts - cut, copy
                out.mux(packet)
    with video.open_video(trimmed) as opened:
        assert len(opened) == FRAMES - 17 < opened.stream.frames
        assert numbers(opened.read(range(len(opened)))) == list(range(17, FRAMES))
        assert numbers(opened.read([20, 0, 3])) == [37, 17, 20]


def test_a_recording_that_begins_anywhere(tmp_path):
    """What comes before the first key frame cannot be decoded, and is no frame of the video."""
    source, late = encode(tmp_path / "whole.ts", *KINDS["h264.ts"]), tmp_path / "late.ts"
    with av.open(str(source)) as given, av.open(str(late), "w") as out:
        copy = out.add_stream_from_template(given.streams.video[0])
        for packet in list(given.demux(video=0))[5:-1]:
            packet.stream = copy
            out.mux(packet)
    with video.open_video(late) as opened:
        first = numbers(opened.read([0]))[0]
        assert len(opened) == FRAMES - first == FRAMES - 12
        assert numbers(opened.read([20, 1])) == [32, 13]


# Damage ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [
    "h264.mkv", "vp9.webm", "h264.flv", "fragmented.mp4", "mpeg4_b.avi", "b_frames.mp4", "av1.mp4",
])
@pytest.mark.parametrize("share", [0.4, 0.6])
def test_a_file_that_is_cut_off_is_found(tmp_path, kind, share):
    codec, options, container = KINDS[kind]
    path = encode(tmp_path / kind, codec, options, container or {"movflags": "faststart"} if ".mp4" in kind else {})
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(Unreadable, match=r"cut off|no readable video"):
        video.open_video(path)


def test_sound_may_last_longer_than_the_pictures(tmp_path):
    path = tmp_path / "sound.mkv"
    with av.open(str(path), "w") as out:
        stream, sound = out.add_stream("libx264", rate=25), out.add_stream("pcm_s16le", rate=8000)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for frame in textured(20):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode())
        for i in range(40):  # 4 s
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
            samples.rate, samples.pts = 8000, 800 * i
            out.mux(sound.encode(samples))
        out.mux(sound.encode())
    with video.open_video(path) as opened:
        assert len(opened) == 20


def test_frames_of_several_sizes_are_named(tmp_path):
    for i, size in enumerate([(8, 8), (8, 10)], 1):
        Image.new("RGB", size).save(tmp_path / f"{i}.png")
    with pytest.raises(Unreadable, match="several sizes: 8 x 10, 8 x 8"), video.open_video(tmp_path) as opened:
        opened.read([0, 1])


# Hostile files --------------------------------------------------------------------------------------------


def _patched(path: Path, box: bytes, values: dict[int, int]) -> Path:
    data = bytearray(path.read_bytes())
    for offset, value in values.items():
        struct.pack_into(">I", data, data.rindex(box) + 4 + offset, value)
    path.write_bytes(data)
    return path


def _claims_many_samples(folder: Path) -> Path:
    path = _patched(encode(folder / "stsz.mp4", "mpeg4", frames=textured(3)), b"stsz", {4: 1, 8: 88_000_000})
    return _patched(path, b"stsc", {12: 88_000_000})


def _claims_many_samples_in_a_fragment(folder: Path) -> Path:
    path = encode(folder / "trun.mp4", "mpeg4", container=KINDS["fragmented.mp4"][2], frames=textured(3))
    return _patched(path, b"trun", {0: 1, 4: 88_000_000})


def _claims_to_be_packed(folder: Path) -> Path:
    path = folder / "cmov.mp4"
    path.write_bytes(struct.pack(">I4sI4s", 16, b"moov", 8, b"cmov"))
    return path


def _grows(folder: Path) -> Path:
    """Frames of a raw stream become large on the way, when the header has been believed."""
    path = folder / "grows.h264"
    small = encode(folder / "small.h264", frames=textured(20)).read_bytes()
    large = encode(folder / "large.h264", frames=[np.zeros((6400, 6400, 3), np.uint8)], options={"preset": "ultrafast"})
    path.write_bytes(small + large.read_bytes())
    return path


def _of_many_frames(folder: Path) -> Path:
    """A packet of one byte each."""
    path = _patched(encode(folder / "long.mp4", "mpeg4", frames=textured(3)), b"stsz", {4: 1, 8: 600_000})
    _patched(path, b"stsc", {12: 600_000})
    with open(path, "ab") as file:
        file.write(bytes(600_000))
    return path


def test_absurd_claims_cost_neither_memory_nor_time(tmp_path):
    """In a process of its own, whose memory at its peak is taken."""
    files = {
        _claims_many_samples(tmp_path): "88000000 samples in",
        _claims_many_samples_in_a_fragment(tmp_path): "88000000 samples in",
        _claims_to_be_packed(tmp_path): "compressed",
        _of_many_frames(tmp_path): "more than 500000 frames",
        _grows(tmp_path): "damaged: frame",
        tmp_path / "large.h264": "6400 x 6400 pixels",
    }
    script = """
import resource, sys, av
from common.data.video import open_video
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
for path in sys.argv[1:]:
    try:
        with open_video(path) as video: video.read(range(len(video)))
    except OSError as error: print(type(error).__name__, error)
print((peak() - before) // 1024)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, *files], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    *errors, grown_mib = done.stdout.splitlines()
    for error, message in zip(errors, files.values(), strict=True):
        assert error.startswith("Unreadable") and message in error
    assert int(grown_mib) < 300


def test_one_read_does_not_fill_the_memory(tmp_path):
    path = encode(tmp_path / "wide.mp4", frames=[np.zeros((4096, 8192, 3), np.uint8)], options={"preset": "ultrafast"})
    with video.open_video(path) as opened, pytest.raises(Unreadable, match="100 frames of 8192 x 4096 are more than 4"):
        opened.read([0] * 100)


@pytest.mark.parametrize("name", ["clip.mp4", "frames/1.png"])
def test_a_pipe_is_not_waited_for(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    os.mkfifo(path)
    with pytest.raises(Unreadable, match=r"no regular file|no frames"):
        video.open_video(path if name == "clip.mp4" else path.parent)


@pytest.mark.parametrize("text", [
    "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{}\n#EXT-X-ENDLIST\n", "ffconcat version 1.0\nfile {}\n",
])
def test_a_playlist_reaches_for_nothing(tmp_path, text):
    """Neither an address nor another file: a data set may name no files of its reader's."""
    encode(tmp_path / "other.ts", *KINDS["h264.ts"])
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        for target in (f"http://127.0.0.1:{server.getsockname()[1]}/x.ts", tmp_path / "other.ts", "other.ts"):
            (tmp_path / "list.m3u8").write_text(text.format(target))
            with pytest.raises(Unreadable, match="no readable video"):
                video.open_video(tmp_path / "list.m3u8")
        with pytest.raises(TimeoutError):
            server.accept()


# Frames ---------------------------------------------------------------------------------------------------


def _save(folder: Path, names, start: int = 0) -> Path:
    """Frames number `start` and on, under these names."""
    folder.mkdir(exist_ok=True, parents=True)
    for frame, name in zip(textured(FRAMES)[start:], names):
        Image.fromarray(frame).save(folder / name)
    return folder


def test_only_frames_are_frames(tmp_path):
    """Beside 12 frames: optical flow as mmaction writes it, the same frames as JPEG, a poster, macOS's twins."""
    folder = _save(tmp_path, [f"img_{i:05d}.png" for i in range(1, 13)])
    for axis in "xy":
        _save(folder, [f"flow_{axis}_{i:05d}.jpg" for i in range(1, 13)], start=20)
    _save(folder, [f"img_{i:05d}.jpg" for i in range(1, 13)], start=30)
    _save(folder, ["poster.jpg"])
    (folder / "._img_00001.png").write_bytes(b"Mac OS X")
    (folder / "Thumbs.db").write_bytes(b"Windows")
    with video.open_video(folder) as opened:
        assert numbers(opened.read(range(len(opened)))) == list(range(12))


@pytest.mark.parametrize("names, message", [
    (["1.png", "2.png", "4.png"], r"1 of 4 frames are missing, the first after 2\.png"),
    (["img_010.png", "img_020.png", "img_050.png"], "2 of 5 frames are missing"),
    (["a_1.png", "a_2.png", "b_1.png"], "several series of frames: a_#, b_#"),
    (["1.png", "01.png"], r"01\.png and 1\.png are the same frame"),
    (["flow_x_1.png", "flow_y_1.png"], "several series"),
])
def test_frames_that_are_no_series_are_refused(tmp_path, names, message):
    with pytest.raises(Unreadable, match=message):
        video.open_video(_save(tmp_path, names))


@pytest.mark.parametrize("names", [
    ["8.png", "9.PNG", "10.jpeg"], ["frame5.png", "frame10.png", "frame15.png"], ["a.png", "b.png", "c.png"],
    ["2024-01-31 23.59.59.png", "2024-02-01 00.00.01.png", "2024-02-01 00.00.02.png"],
])
def test_series_of_frames(tmp_path, names):
    with video.open_video(_save(tmp_path, names)) as opened:
        assert numbers(opened.read([2, 0, 1])) == [2, 0, 1]


def test_sixteen_bits(tmp_path):
    ramp = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "1.png")
    with video.open_video(tmp_path) as opened:
        assert np.array_equal(opened.read([0])[0, ..., 0], (ramp.astype(int) + 128) // 257)


def test_a_zip_of_frames(tmp_path):
    """As CtP's authors prepare videos."""
    folder = _save(tmp_path / "v_Archery_g01_c01", [f"img_{i:05d}.jpg" for i in range(1, 13)])
    with zipfile.ZipFile(tmp_path / "v_Archery_g01_c01.zip", "w") as archive:
        for path in folder.iterdir():
            archive.write(path, f"v_Archery_g01_c01/{path.name}")
        archive.writestr("__MACOSX/v_Archery_g01_c01/._img_00001.jpg", "Mac OS X")
    with video.open_video(folder) as one, video.open_video(tmp_path / "v_Archery_g01_c01.zip") as other:
        assert len(one) == len(other) == 12 and np.array_equal(one.read([11, 3]), other.read([11, 3]))


def test_a_damaged_zip_is_an_os_error(tmp_path):
    folder, path = _save(tmp_path / "frames", [f"{i}.png" for i in range(1, 6)]), tmp_path / "frames.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for frame in folder.iterdir():
            archive.write(frame, frame.name)
    with zipfile.ZipFile(path) as archive:
        place = archive.getinfo("3.png").header_offset
    data = bytearray(path.read_bytes())
    data[place + 100 : place + 120] = bytes(20)
    path.write_bytes(data)
    with video.open_video(path) as opened:
        assert numbers(opened.read([0, 4])) == [0, 4]
        with pytest.raises(Unreadable, match=r"3\.png"):
            opened.read([2])
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(Unreadable, match="cannot be read"):
        video.open_video(path)


def test_a_bomb_of_a_zip(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("1.bmp", bytes(2**26 + 1))
    with video.open_video(tmp_path / "bomb.zip") as opened, pytest.raises(Unreadable, match="unpacks to more than"):
        opened.read([0])
