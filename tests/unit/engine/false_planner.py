"""Planners that are none: what they do is said by the request's policy. Started as the real one is."""

from __future__ import annotations

import os
import sys

import msgspec
import numpy as np

from drumline.engine.planner_frames import FrameReader, no_plan, pack_plan, requests


def main() -> None:
    reader = FrameReader()
    while data := os.read(0, 1 << 20):
        for frame in reader.feed(data):
            request = requests.decode([frame])
            answer = no_plan(request, "")
            if request.policy == "garbage":
                os.write(1, b"\0\0\0\4text")
            elif request.policy == "oversized":
                os.write(1, b"\xff\xff\xff\xff")
            elif request.policy == "another's":
                os.write(1, pack_plan(msgspec.structs.replace(answer, number=request.number - 1)))
            elif request.policy == "misshapen":
                os.write(1, pack_plan(msgspec.structs.replace(answer, placement=np.zeros((1, 1), dtype=np.int32))))
            elif request.policy == "twice":
                os.write(1, pack_plan(answer) * 2)
            elif request.policy == "exit":
                sys.exit(7)


if __name__ == "__main__":
    main()
