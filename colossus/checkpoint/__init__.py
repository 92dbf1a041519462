"""Checkpoints: the training state on disk, whole or not there at all.

    save.py         the state into a directory that appears in one instant
    save_shards.py  the same by many ranks, each with boxes of the tensors: shard.py, ranks.py
    saver.py        either behind training's back, and what to keep: retention.py
    load.py         back again, every byte checked; the newest good one
    load_shards.py  only a rank's own boxes, under any layout
    expect.py       is it a checkpoint of this model?
    manifest.py     what a checkpoint says about itself; by many ranks: index.py, part.py, and tiling.py: who has what
    payload.py      tensors in files
    directory.py    names, publication, leftovers of dead processes

A checkpoint is a directory:

    checkpoints/step-00001200/
        manifest.json                 step, facts, model; every tensor's dtype, shape, pieces and hashes
        model-00000.safetensors       one payload per leading name (`model.`, `optimizer.`) and writing rank
        optimizer-00000.safetensors

A tensor is a list of pieces, each with its offsets in the whole tensor and its place in a payload. One
process writes one piece per tensor. Many ranks write theirs side by side, and the manifest names their parts:

    checkpoints/step-00001200/
        manifest.json                 step, facts, model; every part with its hash; which rank holds which box
        part-00003.json               what rank 3 wrote: its boxes, payloads, hashes
        model-00003.safetensors
        optimizer-00003.safetensors
"""

from colossus.checkpoint.directory import Checkpoint, clean, list_checkpoints
from colossus.checkpoint.load import Loaded, Rejected, load, load_newest, verify
from colossus.checkpoint.load_shards import load_newest_shards, load_shards
from colossus.checkpoint.ranks import ProcessGroupRanks, Ranks, SingleRank
from colossus.checkpoint.retention import retire
from colossus.checkpoint.save import Saved, save
from colossus.checkpoint.save_shards import save_shards
from colossus.checkpoint.saver import SaveFailed, Saver
from colossus.checkpoint.shard import Box, Shard

__all__ = [
    "Box",
    "Checkpoint",
    "Loaded",
    "ProcessGroupRanks",
    "Ranks",
    "Rejected",
    "SaveFailed",
    "Saved",
    "Saver",
    "Shard",
    "SingleRank",
    "clean",
    "list_checkpoints",
    "load",
    "load_newest",
    "load_newest_shards",
    "load_shards",
    "retire",
    "save",
    "save_shards",
    "verify",
]
