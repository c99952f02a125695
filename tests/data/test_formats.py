"""Every layout of a file format gives the rows that are meant, or is refused in one clear line."""

import os
from pathlib import Path

import pytest

from mmpeft.data.sources import DataError, load_records
from tests.data.layouts import formats_documents, formats_folders, formats_text

LAYOUTS = [*formats_text.LAYOUTS, *formats_documents.LAYOUTS, *formats_folders.LAYOUTS]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_a_layout_is_read_as_meant_or_refused(layout, tmp_path):
    path = tmp_path / layout.write(tmp_path)
    if layout.refused is not None:
        with pytest.raises(DataError) as caught:
            load_records(path, **layout.settings)
        assert layout.refused in str(caught.value)
        assert "2 problem" not in str(caught.value)
        return
    records = load_records(path, **layout.settings)
    assert len(records) == len(layout.records)
    for record, meant in zip(records, layout.records, strict=True):
        assert [_relative(image, tmp_path) for image in record["images"]] == meant["images"]
        rest = {key: value for key, value in meant.items() if key != "images"}
        assert {key: record.get(key) for key in rest} == rest


def _relative(image: str | bytes, folder: Path) -> str | bytes:
    return image if isinstance(image, bytes) else os.path.relpath(image, os.path.realpath(folder))
