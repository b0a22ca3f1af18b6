"""Frames by number, from a file of any container FFmpeg knows.

Decoding is PyAV's: it is a plain wheel with its own FFmpeg, and asked for frame i it can be made to give exactly
frame i (common/data/records/video_decoding_*.md compares it with OpenCV, decord and torchcodec).
"""

from __future__ import annotations

import bisect
import os
import re
import stat
import struct
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from common.data.picture import Unreadable
from common.data.video.frames import FrameFolder, check_bytes, stack

SUFFIXES = {
    ".3g2", ".3gp", ".asf", ".avi", ".divx", ".dv", ".f4v", ".flv", ".gif", ".m1v", ".m2t", ".m2ts", ".m2v", ".m4v",
    ".mkv", ".mov", ".mp4", ".mpe", ".mpeg", ".mpg", ".mts", ".mxf", ".ogv", ".qt", ".rm", ".rmvb", ".ts", ".vob",
    ".webm", ".wmv",
}
SLACK = 2  # frames at the end that an AVI's index counts and its decoder never gives: the last one stands in
LARGEST_PX = 36_000_000  # of a frame: 8K film is 8192 x 4320
LONGEST = 500_000  # frames: four and a half hours
MOST_HEADER_BYTES = 2**26  # of an .mp4
# FFmpeg's names of the containers that are opened. Not among them: playlists and the like, which open the files and
# addresses that they name. wav and mp3 only so that sound is called by its name.
FORMATS = (
    "asf,avi,dv,flv,gif,h264,hevc,ivf,m4v,matroska,mjpeg,mov,mp3,mpeg,mpegts,mpegvideo,mxf,nut,obu,ogg,rm,swf,vc1,wav,"
    "wtv,yuv4mpegpipe"
)
OWN_DURATION = {"flv", "matroska", "mov"}  # others' is a guess by FFmpeg, from what is there


class VideoFile:
    """An open video: ``len`` is its number of frames, `read` decodes some of them. Close it, or use it in ``with``.

    ``size`` (width, height) is as it is stored, ``rate`` frames/s, ``codec`` its name; ``rotation``, in degrees
    clockwise, is how far frames are turned to stand upright, once one has been read.

    Raises `Unreadable` for a file that cannot be opened, is cut off, makes absurd claims, or is damaged where it is
    read. Two kinds of damage cannot be seen: .mpg, .ts, .wmv and .gif do not say how long they should be, and VP9 and
    HEVC decode a few changed bytes into wrong pictures.
    """

    def __init__(self, path: str | Path):
        import av
        from av.video.reformatter import VideoReformatter

        self.path, self.av = path, av
        # One for all frames, on this thread: to_ndarray(format=...) sets a scaler up for each, at ten times the cost.
        self.scaler = VideoReformatter()
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be waited for
                raise ValueError("it is no regular file")
            check_sample_tables(path)
            self.container = av.open(
                f"file:{path}", metadata_errors="replace",  # AVIs carry text of any encoding
                options={"protocol_whitelist": "file", "format_whitelist": FORMATS},
            )
        except (OSError, ValueError, av.FFmpegError) as error:
            raise Unreadable(f"{path} is no readable video: {error}") from None
        try:
            self._index()
        except BaseException:
            self.close()
            raise

    def _index(self) -> None:
        """Lists the packets, which is quick, so that a frame's number can be told from its time stamp."""
        streams = self.container.streams.video
        if not streams:
            raise Unreadable(f"{self.path} holds no video stream")
        cover = self.av.stream.Disposition.attached_pic
        self.stream = next((s for s in streams if not s.disposition & cover), streams[0])
        codec = self.stream.codec_context
        if codec is None:
            raise Unreadable(f"{self.path} does not name its codec, or none of this build's")
        codec.thread_count = 1  # loading processes are as many as there are cores
        codec.options = {"max_pixels": str(LARGEST_PX)}  # a stream may change its size on the way
        self.size, self.codec, self.rotation, self.matrix = (codec.width, codec.height), codec.name, 0, False
        self.rate = float(self.stream.average_rate or self.stream.guessed_rate or 0)
        claimed = self.stream.frames
        if codec.width * codec.height > LARGEST_PX or claimed > LONGEST:
            raise Unreadable(f"{self.path} claims {claimed} frames of {codec.width} x {codec.height} pixels")
        try:
            packets = [
                (p.pts, p.size, p.dts, p.duration, p.is_keyframe, p.is_discard, p.is_corrupt)
                for p in islice(self.container.demux(self.stream), LONGEST + 1) if p.size
            ]
        except self.av.FFmpegError as error:
            raise Unreadable(f"{self.path} is damaged: {error}") from None
        if len(packets) > LONGEST:
            raise Unreadable(f"{self.path} holds more than {LONGEST} frames")
        if all(hide for *_, hide, _ in packets):
            raise Unreadable(f"{self.path} holds no frames")
        times, sizes, self.dts, durations, keys, hidden, partial = zip(*packets)
        shown = [time for time, hide in zip(times, hidden) if not hide]  # an edit list hides what must be decoded
        if len(packets) + SLACK < claimed or not claimed:
            end = max((time or 0) + (duration or 0) for time, duration in zip(times, durations))
            if self._ends_early(end, partial[-1]):
                raise Unreadable(f"{self.path} is cut off: {len(shown)} of {claimed or 'its'} frames are there")
        self.packets = list(zip(times, sizes))
        self.place = {time: place for place, time in enumerate(times)}
        # AVI has no time stamps, only packets in order, and a B-frame may share one: then frames are counted instead.
        self.counted = None in self.place or len(self.place) < len(packets) or bool(
            "avi" in self.container.format.name and codec.has_b_frames
        )
        self.length = len(shown)
        if not self.counted:
            self.keys = sorted((times[i], i) for i, key in enumerate(keys) if key) or [(min(times), 0)]
            # What stands before the first key frame, in a recording that begins anywhere, cannot be decoded.
            self.times = sorted(time for time in shown if time >= self.keys[0][0])
            self.rank = {time: number for number, time in enumerate(self.times)}
            self.length = len(self.times)

    def _ends_early(self, end: int, partial: bool) -> bool:
        """Whether no stream lasts as long as the container says, or the last packet is only a part of one.

        `end` is where the video ends, in its own time base.
        """
        container, stream = self.container, self.stream
        if not OWN_DURATION & set(container.format.name.split(",")):
            return bool(stream.frames)
        if partial:
            return True
        if stream.frames and stream.duration:  # of the frames that an edit list leaves
            return end + (SLACK + 1) * stream.duration // stream.frames < stream.duration
        whole = (container.duration or 0) / self.av.time_base
        allowed = whole - max(0.5, 0.05 * whole)  # streams differ a little, and a last frame's duration may be missing
        if end * stream.time_base >= allowed:
            return False
        container.seek(container.start_time or 0)
        ends = [(p.pts + (p.duration or 0)) * p.time_base for p in container.demux() if p.pts is not None]
        return max(ends, default=0) < allowed

    def __len__(self) -> int:
        return self.length

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """Frames (len(indices), H, W, 3), uint8 RGB, upright; indices from 0, in any order, repeated at will.

        `Unreadable` if one of them is damaged or cannot be decoded; damage elsewhere in the file is not looked for.
        """
        wanted = {int(number) for number in indices}
        if not 0 <= min(wanted) <= max(wanted) < len(self):
            raise IndexError(f"{self.path} has frames 0 to {len(self) - 1}, not {min(wanted)} to {max(wanted)}")
        check_bytes(self.path, len(indices), self.size)
        found, last, final, problem = {}, -1, None, "it cannot be decoded"
        # A decoder may need more than one key frame before: then from further back.
        for back in (0,) if self.counted else (0, 1, len(self.keys)):
            try:
                for number, frame in self._decode(wanted - found.keys(), back):
                    if number in wanted and not frame.is_corrupt:
                        found[number] = self._rgb(frame)
                    if number > last:
                        last, final = number, frame
            except self.av.FFmpegError as error:
                problem = error
            if len(found) == len(wanted):
                break
        for number in wanted - found.keys():
            if number < len(self) - SLACK or last < len(self) - 1 - SLACK or final is None or final.is_corrupt:
                raise Unreadable(f"{self.path} is damaged: frame {number} of {len(self)}: {problem}")
            found[number] = self._rgb(final)
        return stack(self.path, [found[int(number)] for number in indices])

    def __iter__(self) -> Iterator[np.ndarray]:
        """All frames (H, W, 3) that the decoder gives, in order, one at a time in memory."""
        try:
            for number, frame in self._decode(set(range(len(self))), 0):
                if frame.is_corrupt:
                    raise Unreadable(f"{self.path} is damaged: frame {number} of {len(self)}")
                yield self._rgb(frame)
        except self.av.FFmpegError as error:
            raise Unreadable(f"{self.path} is damaged: {error}") from None

    def _decode(self, wanted: set[int], back: int) -> Iterator[tuple[int, Any]]:
        """(number, frame) of the wanted and of others, from the key frame before them or from `back` further back."""
        if self.counted:
            self._seek(0)
            yield from zip(range(max(wanted) + 1), self.container.decode(self.stream))
            return
        codec, asked = self.stream.codec_context, {self.times[number] for number in wanted}
        for key, final in self._runs(wanted, back):
            skips = None
            for packet in self._packets(key, final):
                # A frame nobody asked for, and no other frame refers to, need not be decoded: the pixels are the same.
                skip = not back and packet.pts not in asked
                if skip != skips:
                    codec.skip_frame, skips = "NONREF" if skip else "DEFAULT", skip
                yield from self._numbered(codec.decode(packet))
            yield from self._numbered(codec.decode(None))

    def _packets(self, key: int, final: int) -> Iterator[Any]:
        """The packets from a key frame's to the one at place `final`."""
        first = self.keys[key][1]
        # Some demuxers go too far, and in .mpg time stamps are wrong for a while after a jump: then from further back.
        for start in (key, key - 1, key - 4, 0):
            self._seek(self.keys[max(start, 0)][1] if start else 0)
            place = None
            for packet in self.container.demux(self.stream):
                stamp = packet.pts, packet.size
                if place is None and stamp == self.packets[first]:
                    place = first
                if place is None and packet.size:
                    continue
                if place is None or stamp != self.packets[place]:
                    break
                yield packet
                if place == final:
                    return
                place += 1
            if place is not None:
                return

    def _numbered(self, frames: Iterable[Any]) -> list[tuple[int, Any]]:
        return [(self.rank[frame.pts], frame) for frame in frames if frame.pts in self.rank]

    def _runs(self, wanted: set[int], back: int) -> list[list[int]]:
        """Stretches of packets that hold the wanted frames: [number of the key frame, place of the last packet]."""
        runs: list[list[int]] = []
        for number in sorted(wanted):
            time = self.times[number]
            key = max(bisect.bisect_right(self.keys, (time, len(self.packets))) - 1 - back, 0)
            if runs and self.keys[key][1] <= runs[-1][1] + 1:
                runs[-1][1] = max(runs[-1][1], self.place[time])
            else:
                runs.append([key, max(self.keys[key][1], self.place[time])])
        return runs

    def _seek(self, place: int) -> None:
        time, dts = self.packets[place][0], self.dts[place]  # MPEG streams and others are sought by dts
        self.container.seek(dts if dts is not None else time or 0, stream=self.stream)

    def _rgb(self, frame: Any) -> np.ndarray:
        if self.matrix is False:  # asked of one frame: it costs as much as converting the colours
            self.matrix, self.rotation = _display_matrix(frame), -frame.rotation % 360
        return upright(self.scaler.reformat(frame, format="rgb24", threads=1).to_ndarray(), self.matrix)

    def close(self) -> None:
        self.container.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def _display_matrix(frame: Any) -> np.ndarray | None:
    """(3, 3) integers: where a phone or a camera says that x and y of the frame go; None for as they are."""
    from av.sidedata.sidedata import Type

    data = frame.side_data.get(Type.DISPLAYMATRIX)
    return None if data is None else np.frombuffer(data, dtype=np.int32).reshape(3, 3)


def upright(frame: np.ndarray, matrix: np.ndarray | None) -> np.ndarray:
    """Turned and mirrored to the nearest quarter: matrix rows are what one step in x, and in y, becomes in (x, y)."""
    if matrix is None:
        return frame
    (xx, xy), (yx, yy) = matrix[:2, :2].astype(np.int64)
    if abs(xy) + abs(yx) > abs(xx) + abs(yy):
        frame, xx, yy = frame.transpose(1, 0, 2), yx, xy
    return frame[:: -1 if yy < 0 else 1, :: -1 if xx < 0 else 1]


def check_sample_tables(path: str | Path) -> None:
    """`ValueError` if an .mp4 or .mov claims more samples than it has bytes: FFmpeg would make room for them all.

    Only tables that need not spell their samples out can lie: stsz with one size for all, trun without fields. They
    may be nested in anything but the media data, and packed.
    """
    with open(path, "rb") as file:
        size, at, header = os.fstat(file.fileno()).st_size, 0, []
        while len(start := file.read(16)) >= 8 and start[4:8].isascii():
            length, kind = struct.unpack(">I4s", start[:8])
            if length == 1 and len(start) == 16:
                length = struct.unpack(">Q", start[8:])[0]
            if not at and kind not in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot", b"styp", b"sidx"):
                return
            if length < 8:  # to the end, or nonsense
                length = size - at
            if kind != b"mdat":
                file.seek(at)
                header.append(file.read(min(length, MOST_HEADER_BYTES)))
                if sum(map(len, header)) >= MOST_HEADER_BYTES:
                    raise ValueError("its header is larger than any film's")
            at += length
            file.seek(at)
    header = b"".join(header)
    if b"cmov" in header:
        raise ValueError("its header is compressed")
    tables = re.finditer(rb"stsz.{4}(?!\0{4}).{4}(.{4})|trun.{4}(.{4})", header, re.DOTALL)
    if (claimed := sum(int.from_bytes(table[1] or table[2]) for table in tables)) > size:
        raise ValueError(f"it claims {claimed} samples in {size} bytes")


def open_video(path: str | Path) -> VideoFile | FrameFolder:
    """A video file, or a folder or zip of frames, open for reading."""
    frames = Path(path).is_dir() or Path(path).suffix.lower() == ".zip"
    return FrameFolder(path) if frames else VideoFile(path)


def write_video(path: Path, frames: Iterable[np.ndarray], fps: float = 12, **options: str) -> None:
    """Writes frames (H, W, 3), uint8 RGB, with even H and W: .mp4 as H.264 with these options, .avi as MPEG-4, .gif."""
    frames = iter(frames)
    first = next(frames)
    if path.suffix == ".gif":
        rest = [Image.fromarray(frame) for frame in frames]
        Image.fromarray(first).save(path, save_all=True, append_images=rest, duration=int(1000 / fps), loop=0)
        return
    import av

    with av.open(str(path), "w") as container:
        rate = Fraction(fps).limit_denominator(1001)
        stream = container.add_stream("mpeg4" if path.suffix == ".avi" else "libx264", rate=rate, options=options)
        stream.height, stream.width = first.shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1  # the same file every time
        stream.codec_context.qmax = 4 if path.suffix == ".avi" else stream.codec_context.qmax
        for frame in chain([first], frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
