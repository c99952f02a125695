"""Lists of images, as they are captioned: from folders, globs, single files, tables and tars, in one fixed order.

What lies in folders and matches globs comes first, sorted by name, then tars and tables, sorted by theirs and in their
own order. A list holds names alone: an image is read when it is asked for, wherever in the list it stands.
"""

from mmpeft.data.image_lists.base import Listed
from mmpeft.data.image_lists.find import ImageList, find_images, left_out

__all__ = ["ImageList", "Listed", "find_images", "left_out"]
