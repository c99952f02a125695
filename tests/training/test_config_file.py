"""A config file that cannot be read is told by its name."""

import pytest

from mmpeft.cli import main
from mmpeft.training.config_file import check_config_files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "# Größe\nmodel: {}\n".encode("latin-1"),
            r"mine\.yaml: not UTF-8 at byte 4; save the file as UTF-8",
        ),
        (b"model:\n  - {\n", r"mine\.yaml:3: not valid YAML: "),
        (b"", r"mine\.yaml holds nothing; wanted settings"),
        (b"- 1\n", r"mine\.yaml holds a list; wanted settings"),
        (b"a\0b", r"mine\.yaml: not valid YAML: "),
    ],
)
@pytest.mark.parametrize("words", [["--config"], ["--config="], ["-c"]])
def test_what_is_no_config_is_refused_by_name(tmp_path, content, message, words):
    (path := tmp_path / "mine.yaml").write_bytes(content)
    named = [f"{words[0]}{path}"] if words[0].endswith("=") else [*words, str(path)]
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        main(["fit", *named])


def test_a_mark_of_the_byte_order_is_none_of_the_settings(tmp_path):
    (path := tmp_path / "mine.yaml").write_bytes(b"\xef\xbb\xbfmodel: {}\n")
    check_config_files(["--config", str(path)])


def test_a_runs_own_config_is_one_too(tmp_path):
    (run := tmp_path / "run").mkdir()
    (run / "mmpeft.json").touch()
    (run / "config.yaml").touch()
    with pytest.raises(SystemExit, match=r"run/config\.yaml holds nothing"):
        main(["test", "--run", str(run)])
