"""Captions at scale: any number of images, by any number of workers, to the same bytes, whatever is killed.

::

    image_lists   folders, tables, tars -> one fixed list, cut into shards by number      data/image_lists
    job           the list's hash, the run, what is asked: what decides about the rows
    worker        a shard's number in, its rows on disk
    processes     workers on this machine             on_ray   workers on a cluster of Ray
    output        whose shards these are, and the file that they are joined to
    command       all together: `mmpeft caption`
"""

from mmpeft.inference.captioning.command import caption, join
from mmpeft.inference.captioning.job import Task

__all__ = ["Task", "caption", "join"]
