"""What Python's standard library says about itself, read from its source files without importing them."""

import ast
import platform
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from mmpeft.samples.sample import PrepareError

LEFT_OUT = re.compile(r"(^|/)((test|tests|idle_test|site-packages|dist-packages)/|_(?!_init__\.py$))")
"""Folders and files with nothing public: tests, installed packages, private modules."""
PUBLIC = {"_pydatetime": "datetime", "_pydecimal": "decimal", "_pyio": "io"}
"""Files that hold the Python source of a public module."""
SENTENCE = re.compile(r"[A-Z`'\"].{15,}?[^.\s]\.(?<!e\.g\.)(?<!i\.e\.)(?= |$)")
MOST_CHARACTERS = 160
"""Longest sentence and longest signature."""
MARKUP = re.compile(r"<image>|\[/?INST\]|</?Img>|[^\x20-\x7e]")
"""What no text of a data set should hold: our own markers, and characters that are not plain."""


@dataclass(frozen=True)
class Documented:
    """A public function, method or class whose docstring begins with a sentence."""

    module: str
    """Dotted, such as "email.message"."""
    name: str
    """Within the module, such as "Message.get_all"."""
    signature: str
    """Name and arguments, such as "Message.get_all(name, failobj=None)"; of a class or property the name alone."""
    summary: str
    """That sentence."""

    @property
    def path(self) -> str:
        return f"{self.module}.{self.name}"

    @property
    def package(self) -> str:
        return self.module.split(".")[0]


@cache
def documented() -> tuple[Documented, ...]:
    """All of the running Python, by module and name; a sentence that occurs again is left out.

    Raises:
        PrepareError: this Python came without its sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    names = sorted(name for name in files if not LEFT_OUT.search(name) or name.removesuffix(".py") in PUBLIC)
    found: dict[str, Documented] = {}
    for name in names:
        module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for entry in read_module(
            PUBLIC.get(module, module), files[name].read_text(encoding="utf-8", errors="replace")
        ):
            found.setdefault(entry.summary.lower(), entry)
    if not found:
        raise PrepareError(
            f"{root} holds no documented Python sources; use a Python that has its standard library as files"
        )
    return tuple(found.values())


def read_module(module: str, source: str) -> Iterator[Documented]:
    """What one source file documents; nothing of a file that this Python cannot parse (templates, say)."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    seen = set()
    for name, node in _definitions(tree.body, ""):
        summary = _summary(node)
        signature = name + _arguments(node, method="." in name)
        if (
            summary
            and name not in seen
            and len(signature) <= MOST_CHARACTERS
            and not MARKUP.search(signature)
        ):
            seen.add(name)
            yield Documented(module, name, signature, summary)


Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def _definitions(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, Definition]]:
    """Public functions and classes, and those inside of public classes, in the order of the file."""
    for node in body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from _definitions(node.body, f"{prefix}{node.name}.")


def _summary(node: Definition) -> str:
    """The first sentence of the docstring's first paragraph; "" if there is none or it is too long."""
    paragraph = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
    found = SENTENCE.match(paragraph)
    text = found[0] if found else ""
    return text if len(text) <= MOST_CHARACTERS and not MARKUP.search(text) else ""


def _arguments(node: Definition, method: bool) -> str:
    """The arguments in brackets, without annotations and without a method's self or cls."""
    if isinstance(node, ast.ClassDef) or any("property" in ast.unparse(d) for d in node.decorator_list):
        return ""
    arguments = node.args
    everything = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    for argument in [*everything, arguments.vararg, arguments.kwarg]:
        if argument:
            argument.annotation = None
    text = ast.unparse(arguments)
    if method:
        text = re.sub(r"^(self|cls)\b(, /)?(, )?", "", text)
    return f"({text})"


def write_readme(folder: Path, told: str, counts: Iterable[str]) -> None:
    """Says beside the data what it is, of which Python, and how much there is."""
    (folder / "README.txt").write_text(
        f"Made by mmpeft from the sources of Python {platform.python_version()} (PSF licence): {told}.\n"
        "Another version of Python gives other rows.\n\n" + "".join(f"{line}\n" for line in counts)
    )
