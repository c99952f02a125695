"""Decoding with a time limit: in a process of its own, which is ended where an image takes too long."""

import contextlib
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as Late
from typing import Any

from PIL import Image

from mmpeft.data.images.config import ImageConfig
from mmpeft.data.images.decode import DEFAULT, load_image
from mmpeft.data.images.source import ImageError, ImageLike


class ImageWorker:
    """`load_image` for many files of unknown origin: none hangs, and one that kills its decoder harms no other.

    The process starts with the first image, and again after one that it did not survive. A context manager.
    """

    def __init__(self):
        self._process: Any = None
        self._code: int | None = None
        self._reader = ThreadPoolExecutor(1)

    def __enter__(self) -> "ImageWorker":
        return self

    def __exit__(self, *error: object) -> None:
        self.end()
        self._reader.shutdown()

    def load(
        self, image: ImageLike, config: ImageConfig = DEFAULT, *, source: str | None = None
    ) -> Image.Image:
        """As `load_image`, within `config.max_seconds`.

        Raises:
            ImageError: also of an image that takes longer, or that ends the process.
        """
        if isinstance(image, Image.Image):
            return load_image(image, config, source=source)  # its bytes were decoded already
        name = source or (repr(str(image)) if not isinstance(image, bytes) else "image")
        return Image.frombytes("RGB", *self.call(_pixels, (image, config, source), config.max_seconds, name))

    def call(self, function: Callable[..., Any], given: tuple[Any, ...], seconds: float, name: str) -> Any:
        """What a function makes of a file, in the process.

        Args:
            function: of a module; what it gives is no text.
            given: its arguments.
            seconds: longest that it may take.
            name: of the file, for errors.

        Raises:
            ImageError: the function's own, or as `load`.
        """
        try:
            answer = self._answer(function, given, seconds) or self._answer(function, given, seconds)
        except Late:
            self.end()
            raise ImageError(
                f"{name}: decoding took longer than {seconds:g} s (image.max_seconds); save it in a simpler "
                "form, raise the limit, or drop it"
            ) from None
        if answer is None:
            raise ImageError(
                f"{name}: its decoder ended with code {self._code}, and again when it was begun anew; save it again, "
                "or drop it"
            )
        if isinstance(answer, str):
            raise ImageError(answer)
        return answer

    def _answer(self, function: Callable[..., Any], given: tuple[Any, ...], seconds: float) -> Any:
        """What the process says of an image; None where it ended instead. Once that need not be the image's fault: a
        process is also killed from outside, or for memory that others take.

        Raises:
            Late: it says nothing for so long.
        """
        process = self._started()
        try:
            pickle.dump((function, given), process.stdin)
            process.stdin.flush()
            return self._reader.submit(pickle.load, process.stdout).result(seconds)
        except Late:  # an OSError, too
            raise
        except (EOFError, OSError, pickle.UnpicklingError):
            self._code = process.wait()
            self.end()
            return None

    def end(self) -> None:
        """Ends the process, whatever it is doing."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                with contextlib.suppress(OSError):
                    pipe.close()
        self._process = None

    def _started(self) -> Any:
        if self._process is None or self._process.poll() is not None:
            self.end()
            path = os.pathsep.join(sys.path)  # the same packages, however this process found them
            self._process = subprocess.Popen(
                [sys.executable, "-c", "from mmpeft.data.images.worker import serve; serve()"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=os.environ | {"PYTHONPATH": path},
            )
        return self._process


def _pixels(image: ImageLike, config: ImageConfig, source: str | None) -> tuple[tuple[int, int], bytes]:
    """Size and RGB bytes."""
    loaded = load_image(image, config, source=source)
    return loaded.size, loaded.tobytes()


def serve() -> None:
    """The process: (function, its arguments) in, what it gives or the text of an error out, until nothing comes."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C is for the process that asks: without it this one ends
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a decoder prints is no answer
    while True:
        try:
            function, given = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = function(*given)
        except ImageError as error:
            answer = str(error)
        pickle.dump(answer, answers)
        answers.flush()
