"""The output of captioning: where its file and its shards lie, whose they are, and how shards become the file."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mmpeft.data.formats.write_parquet import write_parquet
from mmpeft.errors import RefusedError
from mmpeft.files import read_json, told_if_full
from mmpeft.hashing import differences, hash_file
from mmpeft.inference.captioning.shards import ENDING, Shards, publish, published

Format = Literal["jsonl", "parquet"]
META, JOINED = "meta.json", "joined.json"
LOCK = ".lock"
"""Ending of what a job holds while it writes, which may be all that another one has made so far."""
COLUMNS = {
    "image": "text",
    "video": "text",
    "id": "text",
    "question": "text",
    "caption": "text",
    "answer": "text",
    "adapter": "text",
    "log_probability": "number",
    "ranking": {"choice": "text", "score": "number"},
    "error": "text",
}
"""Of the parquet file; what a row does not have is null."""


@dataclass(frozen=True)
class Output:
    """One output.

    Raises:
        RefusedError: a name of another kind of file, or a folder with files of others.
    """

    file: Path
    """All rows."""

    @classmethod
    def named(cls, name: str, format: Format | None = None) -> "Output":
        """What a name stands for: a file, or a folder for one, which is new or has been begun."""
        path, kinds = Path(name), {".jsonl": "jsonl", ".parquet": "parquet"}
        if path.is_dir() or not path.suffix:
            begun = (kind for kind in kinds.values() if cls(path / f"captions.{kind}").shards.is_dir())
            own = cls(path / f"captions.{format or next(begun, 'jsonl')}")
            others = path.is_dir() and any(each.suffix != LOCK for each in path.iterdir())
            if others and not own.shards.is_dir():
                raise RefusedError(
                    f"{path} is a folder; name a file for the captions, such as {path / 'captions.jsonl'}, or a new "
                    "folder"
                )
            return own
        if path.suffix.lower() not in kinds:
            raise RefusedError(f"--output {name} ends in {path.suffix}; wanted .jsonl, .parquet, or a folder")
        if format not in (None, kinds[path.suffix.lower()]):
            raise RefusedError(f"--output {name} is no {format}; leave out --format, or name it .{format}")
        return cls(path)

    @property
    def shards(self) -> Path:
        return self.file.with_name(f"{self.file.name}{ENDING}")

    @property
    def is_parquet(self) -> bool:
        return self.file.suffix.lower() == ".parquet"

    def begin(self, meta: Mapping[str, Any], overwrite: bool) -> None:
        """Takes possession of what is there, or of nothing.

        Raises:
            RefusedError: there are rows of other captions, or a file that was not joined from these shards.
        """
        if overwrite:
            self.clear()
        known = read_json(self.shards / META)
        if changed := [key for key in meta if known.get(key) != meta[key]] if known else []:
            told = "\n".join(differences(known, meta, "made with"))
            raise RefusedError(
                f"{self.file} was made with other {', '.join(changed)}; --overwrite it, or name another --output\n"
                + told
            )
        if self.file.exists() and hash_file(self.file) != read_json(self.shards / JOINED).get("sha256"):
            raise RefusedError(
                f"{self.file} was edited, cut, or made by something else: it is not what its shards were joined to; "
                "move it away, --overwrite it, or name another --output"
            )
        if not known:
            publish(self.shards / META, (json.dumps(meta, indent=2) + "\n").encode())

    def clear(self) -> None:
        """Removes the file and the shards, and nothing else."""
        self.file.unlink(missing_ok=True)
        for pattern in ("[0-9]*.jsonl", META, JOINED):
            for path in self.shards.glob(pattern):
                path.unlink()
        self.tidy()

    def tidy(self) -> None:
        """Removes what writers that were killed have left, once nobody writes any more."""
        for path in [*self.shards.glob(".*.part"), *self.file.parent.glob(f".{self.file.name}.*.part")]:
            path.unlink(missing_ok=True)

    def is_joined(self, shards: Shards) -> bool:
        """Whether the file is there, and of these shards: one that was removed may have been made of other images."""
        return self.file.exists() and read_json(self.shards / JOINED).get("shards") == shards.digest()

    def join(self, shards: Shards) -> None:
        """Makes the file of all shards. What it will be is noted before it is there: killed in between, the next run
        knows it as its own.

        Raises:
            RefusedError: there is no room.
        """
        self.file.parent.mkdir(parents=True, exist_ok=True)
        size = sum(shards.path(shard).stat().st_size for shard in range(len(shards)))
        with told_if_full(self.file, size), published(self.file) as unfinished:
            if self.is_parquet:
                with unicode_alone():
                    write_parquet(unfinished, COLUMNS, _rows(shards))
            else:
                _write_lines(unfinished, shards)
            note = {"sha256": hash_file(unfinished), "shards": shards.digest()}
            self.file.unlink(missing_ok=True)  # of shards as they were: no note would be its own
            publish(self.shards / JOINED, (json.dumps(note) + "\n").encode())


@contextmanager
def unicode_alone() -> Iterator[None]:
    """Raises:
    RefusedError: an image is called as no Unicode can be.
    """
    try:
        yield
    except UnicodeEncodeError as error:
        raise RefusedError(
            f"the image name {error.object!r} is no Unicode, which parquet cannot hold; rename it, or write .jsonl"
        ) from None


def _write_lines(path: Path, shards: Shards) -> None:
    with path.open("wb") as file:
        file.writelines(shards.each())
        file.flush()
        os.fsync(file.fileno())


def _rows(shards: Shards) -> Iterator[Sequence[Mapping[str, Any]]]:
    for lines in shards.each():
        yield [json.loads(line) for line in lines.splitlines()]
