"""File formats -> rows: what a path of `data.train` stands for, and the raw rows in it."""

from mmpeft.data.formats.base import DataError, DataFile, Place, read_rows
from mmpeft.data.formats.find import find_files

__all__ = ["DataError", "DataFile", "Place", "find_files", "read_rows"]
