"""What every trainer needs around its loop. Functions to call: nothing here calls back into a paper but what it was
handed, and nothing is inherited. Imports nothing of data, kernels or metrics.

    files        whole or not at all; UserError; the cache      options      command line and exit codes
    world        processes, devices, seeds                      folder       run folder, revision, hardware
    checkpoints  weights in and out, resumption                 log          log, clock
    recorded     recipes of others' run folders                 shipped      weights that travel with a paper
    results      results.json, report.md                        sweep        members times seeds
    bench        timing                                         drawing      curves, galleries
    readme       the parts that programs write                  cases        what a paper tells the tools
    timm, hf, mm the doors to timm, transformers' Trainer and mmengine's Runner; model_folder, to save_pretrained's
"""

from common.run.checkpoints import (
    built,
    fit,
    load_checkpoint,
    load_run,
    load_weights,
    restore,
    save_checkpoint,
    save_weights,
)
from common.run.door import door, through_the_door
from common.run.files import ROOT, UserError, cache_dir, read_json, write_json, write_text, written_whole
from common.run.folder import command, environment, finished, git_revision, hardware, new_folder, newest, open_run
from common.run.log import Clock, Log, clip_gradients, read_log
from common.run.options import Options, data_folder, main, parse
from common.run.results import (
    SCHEMA,
    finish,
    metric,
    multiply_adds,
    peak_memory_bytes,
    report,
    spread,
    write_results,
)
from common.run.sweep import (
    MULTIPLY_ADDS,
    PARAMS,
    Column,
    Train,
    by_member,
    check_members,
    over_seeds,
    read_scores,
    seeds_of,
    sweep,
    table,
    tables,
)
from common.run.world import (
    World,
    accumulation,
    add_up,
    expect_everywhere,
    gather,
    gather_objects,
    gather_with_gradient,
    join_group,
    micro_batches,
    processes,
    seed_all,
    start_world,
)
