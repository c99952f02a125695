"""Large pages of parquet are read value by value, and every value is the one that pyarrow reads."""

import io
import os
import random

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from mmpeft.data.formats import DataError, columns, large_pages, page_codecs
from mmpeft.data.formats.columns import parquet_rows
from mmpeft.data.formats.large_pages import LARGE, is_large
from mmpeft.data.formats.page_codecs import unpacked_lz4, unsnapped

ROWS = 150


@pytest.fixture
def small(monkeypatch):
    """Pages of 1,000 bytes are large; gives how many columns of row groups were."""
    found = []
    monkeypatch.setattr(large_pages, "LARGE", 1000)
    monkeypatch.setattr(columns, "is_large", lambda *where: found.append(is_large(*where)) or found[-1])
    return found


def value(rng):
    """Bytes of every kind: none, empty, that pack well or not at all, and that come again."""
    kinds = [None, b"", rng.randbytes(rng.randrange(1, 3000)), b"ab" * rng.randrange(1, 3000), b"same" * 500]
    return rng.choice([*kinds, kinds[2], kinds[2]])


def write(path, **how):
    """Images in an object beside their names, alone in one, in a column, in lists, and other columns among them."""
    rng = random.Random(0)
    rows = [
        {
            "number": number,
            "image": rng.choice([None, *[{"bytes": value(rng), "path": "x"}] * 4]),
            "raw": value(rng),
            "alone": rng.choice([None, *[{"bytes": value(rng)}] * 4]),
            "images": [{"bytes": value(rng)}, {"bytes": value(rng)}],
            "text": "a long text " * number,
        }
        for number in range(ROWS)
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, **how)
    return rows


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd", "gzip", "brotli", "lz4"])
@pytest.mark.parametrize("dictionary", [True, False])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("size", [ROWS, 64])
def test_every_value_is_what_was_written(tmp_path, small, compression, dictionary, version, size):
    how = {"compression": compression, "use_dictionary": dictionary, "data_page_version": version}
    rows = write(tmp_path / "a.parquet", row_group_size=size, **how)
    assert list(parquet_rows(tmp_path / "a.parquet")) == list(enumerate(rows, 1))
    groups = -(-ROWS // size)
    # all but what packs well where it is unpacked here, as more does by LZ4
    assert sum(small) >= (1 if compression == "lz4" else 2) * groups


def test_a_column_of_images_alone_and_one_that_is_never_none(tmp_path, small):
    rows = [{"image": os.urandom(500)} for _ in range(ROWS)]
    required = pyarrow.schema([pyarrow.field("image", pyarrow.binary(), nullable=False)])
    for schema in (None, required):
        parquet.write_table(pyarrow.Table.from_pylist(rows, schema), tmp_path / "a.parquet")
        assert [row for _, row in parquet_rows(tmp_path / "a.parquet")] == rows
    assert small == [True, True]


def test_small_pages_are_left_to_pyarrow(tmp_path, monkeypatch):
    rows = write(tmp_path / "a.parquet")
    monkeypatch.setattr(columns, "values", None)
    assert [row for _, row in parquet_rows(tmp_path / "a.parquet")] == rows
    assert LARGE > 100 * 200_000, "a page of Hugging Face's"


@pytest.mark.parametrize("use_dictionary", [True, False])
@pytest.mark.parametrize("compression", ["none", "snappy", "zstd", "gzip", "lz4"])
def test_a_damaged_page_is_told(tmp_path, small, compression, use_dictionary):
    """Wherever bytes are others than were written, rows are read, or one error names the format."""
    path, rng = tmp_path / "a.parquet", random.Random(1)
    rows = [{"image": rng.randbytes(300)} for _ in range(40)]
    table = pyarrow.Table.from_pylist(rows)
    parquet.write_table(table, path, compression=compression, use_dictionary=use_dictionary)
    whole = path.read_bytes()
    refused = 0
    for at in [*range(4, 60), *rng.sample(range(60, 12_000), 60)]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
        found = [row for _, row in parquet_rows(path)]
        if errors := [row for row in found if isinstance(row, DataError)]:
            assert len(errors) == 1
            assert "not readable as parquet" in str(errors[0])
            refused += 1
    assert refused > 10


def packed(data, codec):
    return pyarrow.compress(data, "lz4_raw" if codec == "lz4" else codec, asbytes=True)


UNPACKED = {"snappy": unsnapped, "lz4": unpacked_lz4}


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(sorted(UNPACKED)),
    st.lists(st.tuples(st.binary(max_size=40), st.integers(1, 3000)), max_size=8),
)
def test_what_is_unpacked_in_pieces_is_what_pyarrow_unpacks(codec, parts):
    data = b"".join(text * times for text, times in parts)
    assert b"".join(UNPACKED[codec](io.BytesIO(packed(data, codec)), len(data))) == data


@pytest.mark.parametrize("codec", sorted(UNPACKED))
def test_more_is_unpacked_than_is_held(codec):
    mixed = b"".join(os.urandom(70_000) + bytes(90_000) for _ in range(20))
    data = mixed + os.urandom(5 * page_codecs.HELD) + bytes(5 * page_codecs.HELD)
    found = list(UNPACKED[codec](io.BytesIO(packed(data, codec)), len(data)))
    assert b"".join(found) == data
    assert len(found) > 2
    assert max(map(len, found)) < 2 * page_codecs.HELD


@pytest.mark.parametrize("codec", ["none", "zstd", "gzip", "brotli"])
def test_pages_are_unpacked_piece_by_piece(tmp_path, codec):
    rows = [{"image": os.urandom(2**18) + bytes(2**18)} for _ in range(40)]
    parquet.write_table(
        pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", compression=codec, use_dictionary=False
    )
    column = parquet.ParquetFile(tmp_path / "a.parquet").metadata.row_group(0).column(0)
    with (tmp_path / "a.parquet").open("rb") as file:
        page = max(large_pages._pages(file, column), key=lambda page: page.unpacked)
        file.seek(page.at)
        sizes = [len(piece) for piece in page_codecs.pieces(file, column.compression, page.unpacked)]
    assert sum(sizes) == page.unpacked > 8 * page_codecs.HELD
    assert max(sizes) <= page_codecs.HELD
