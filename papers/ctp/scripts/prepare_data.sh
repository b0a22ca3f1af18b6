#!/usr/bin/env bash
# Looks through a folder of videos and says what is there, what is missing and what is wrong:
#   prepare_data.sh FOLDER [--every 100] [--workers 16]
# What is wrong is left out of lists that `python -m common.data.video lists FOLDER OUT` writes, and of the videos that
# `python -m papers.ctp.scripts.reencode_videos FOLDER OUT` encodes once more, for speed.
source "$(dirname -- "${BASH_SOURCE[0]}")/../../../common/run/script.sh"
look common.data.video "$@"
