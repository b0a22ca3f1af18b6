"""Any tracker as a program that the VOT toolkit can run, over the TraX protocol (pip install vot-trax six).

A paper's ``vot.py`` is ``run.main(lambda: vot.main(PAPER))``; the baselines answer to ``python -m
common.metrics.trackers.vot ncc``. The toolkit (GPL-3) is a program of its own and wants an environment of its own ::

    python -m venv vot && vot/bin/pip install vot-toolkit==0.7.3 attributee==0.1.9 six

It finds trackers in ``trackers.ini`` in the folder it is started from, and runs them in a temporary one ::

    [ncc]                              # for a paper: -m papers.sbt.vot /whole/path/to/run
    label = NCC
    protocol = trax
    command = REPOSITORY/.venv/bin/python -m common.metrics.trackers.vot ncc --region rectangle
    env_PYTHONPATH = REPOSITORY

    vot/bin/vot test ncc                                              # 50 generated frames: does it answer?
    vot/bin/vot initialize vot2018/shortterm --workspace W            # fetches the data; trackers.ini goes into W
    vot/bin/vot evaluate --workspace W ncc && vot/bin/vot analysis --workspace W --format json ncc

Without the download: ``initialize custom --nodownload``, sequences in W/sequences (list.txt; NAME/color/00000001.jpg,
NAME/groundtruth.txt, NAME/sequence with ``channels.color=color/%08d.jpg``; for anchors NAME/anchor.value, a line of
1, -1 or 0 per frame), experiments in W/stack.yaml as in the toolkit's own stacks. That was done with both baselines
on one sequence of VOT, for the reset, anchor and unsupervised experiments. Of version 0.9.0 ``test`` and the
unsupervised experiment work, but its reset and anchor experiments stop at every TraX tracker.

``--region`` is what is sent back: rectangle (VOT 2013-14, 2022 box), polygon (2015-2019), or mask (2020 and later):
there a box is rasterised, which costs overlap, so say so beside the figures. A target given as polygon or mask is
taken by the box around it. The toolkit draws a polygon's corners as pixels that belong to it, so a box w pixels wide
is a polygon from x to x + w - 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from common import run
from common.data.tracking import read_frame
from common.metrics.trackers.baselines import BASELINES
from common.metrics.trackers.paper import Paper
from common.metrics.trackers.protocol import Box, Tracker
from common.run import UserError

RegionKind = Literal["rectangle", "polygon", "mask"]


def serve(tracker: Tracker, region: RegionKind = "rectangle", name: str = "") -> None:
    """Answers a TraX client on standard input and output (or $TRAX_SOCKET) until it says goodbye."""
    try:
        import trax
    except ImportError as error:
        raise UserError(f"VOT's protocol needs two more packages ({error}): pip install vot-trax six") from None
    # All kinds are taken as they come: libtrax's own conversions lose a pixel (polygon to rectangle) or most of the
    # target (polygon to mask).
    with trax.Server(["rectangle", "polygon", "mask"], [trax.Image.PATH], tracker_name=name) as server:
        while (request := server.wait()).type in (trax.TraxStatus.INITIALIZE, trax.TraxStatus.FRAME):
            frame = read_frame(Path(request.image[trax.ImageChannel.COLOR].path()))
            if request.type == trax.TraxStatus.INITIALIZE:
                ((target, _),) = request.objects
                box, properties = region_to_box(target), {}
                tracker.init(frame, box)
            else:
                box, score = tracker.track(frame)
                properties = {"confidence": float(score)}
            server.status([(box_to_region(box, region, frame.shape[:2]), properties)])


def region_to_box(region) -> Box:
    """x, y, w, h of a TraX rectangle, or of the pixels of a polygon or mask."""
    if region.type == "rectangle":
        return region.bounds()
    if region.type == "polygon":
        points = np.array(list(region))
    else:
        points = np.argwhere(region.array())[:, ::-1] + region.offset()
        if not len(points):
            raise UserError("the target is an empty mask")
    return (*points.min(0).tolist(), *(np.ptp(points, axis=0) + 1).tolist())


def box_to_region(box: Box, region: RegionKind, size: tuple[int, int]):
    """A box as a TraX region of the given kind, in a frame of (height, width); one that is not finite is empty."""
    import trax

    x, y, w, h = map(float, box if np.isfinite(box).all() else (0, 0, 0, 0))
    if region == "rectangle":
        return trax.Rectangle.create(x, y, w, h)
    if region == "polygon":
        right, bottom = x + w - 1, y + h - 1
        return trax.Polygon.create([(x, y), (right, y), (right, bottom), (x, bottom)])
    left, right = np.clip(np.round([x, x + w]), 0, size[1]).astype(int).tolist()
    top, bottom = np.clip(np.round([y, y + h]), 0, size[0]).astype(int).tolist()
    if right <= left or bottom <= top:
        return trax.Mask.create(np.zeros((1, 1), np.uint8))
    return trax.Mask.create(np.ones((bottom - top, right - left), np.uint8), left, top)


@dataclass
class Arguments:
    checkpoint: Annotated[Path, tyro.conf.Positional]
    """Run folder, file of weights, or shipped[:NAME]."""
    recipe: str | None = None
    """Recipe of a file of weights."""
    region: RegionKind = "rectangle"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"


def main(paper: Paper) -> None:
    """The command line of ``papers.<name>.vot``."""
    args = tyro.cli(Arguments, prog=f"python -m papers.{paper.name}.vot", description="Answers the VOT toolkit.")
    world = run.start_world(run.Options(device=args.device, precision=args.precision))
    serve(paper.load(args.checkpoint, args.recipe, world).tracker, args.region, paper.name)


Name = Annotated[Literal["static_box", "ncc", "kcf", "csrt"], tyro.conf.Positional]


def baseline(name: Name, region: RegionKind = "rectangle"):
    """Answers the VOT toolkit with a baseline."""
    trackers = {make.folder: make for make in BASELINES.values()}
    serve(trackers[name](), region, name)


if __name__ == "__main__":
    run.main(lambda: tyro.cli(baseline, prog="python -m common.metrics.trackers.vot"))
