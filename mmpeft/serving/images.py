"""Images of requests: decoded within limits in processes of their own, and encoded before the batch is asked to wait.

One that is slow, hostile or broken costs its own request alone.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from queue import SimpleQueue
from threading import Lock

from PIL import Image

from mmpeft.data.features import FeatureCache
from mmpeft.data.images import ImageConfig, ImageError, ImageLike, ImageWorker
from mmpeft.serving.conversation import Posed
from mmpeft.serving.limits import Limits
from mmpeft.serving.refusals import invalid

DEFAULT = ImageConfig()


class RequestImages:
    """Makes features ready, and becomes how the cache decodes.

    Args:
        features: of the engine.
        limits: of the server.
        workers: images decoded at the same time.
    """

    def __init__(self, features: FeatureCache, limits: Limits, workers: int = 2):
        self.features, self.limits = features, limits
        self.threads = ThreadPoolExecutor(workers, "images")
        """In which `prepare` is to run: its memory is bounded by their number."""
        self._workers: SimpleQueue[ImageWorker] = SimpleQueue()
        for _ in range(workers + 1):  # one is for the engine
            self._workers.put(ImageWorker())
        self._decoded: dict[str, Image.Image] = {}
        self._lock = Lock()
        features.encoding.decode = self._take

    def prepare(self, posed: Posed) -> None:
        """Decodes and encodes the images of a question, so that the engine finds their features.

        Raises:
            HttpError: one cannot be used, named by its place in the request.
        """
        for image, place in zip(posed.record["images"], posed.places, strict=True):
            try:
                if self.features.holds(image):
                    continue
                key = self.features.key(image)
                decoded = self._decode(image, self.features.encoder.image_config)
            except ImageError as error:
                raise invalid(place, f"{place}: {error}") from None
            with self._lock:
                self._decoded[key] = decoded
            (loaded,) = self.features.load([image])
            with self._lock:
                self._decoded.pop(key, None)
            if isinstance(loaded, Exception):
                raise invalid(place, f"{place}: {loaded}")

    def close(self) -> None:
        """Ends the processes."""
        self.threads.shutdown(cancel_futures=True)
        while not self._workers.empty():
            self._workers.get().__exit__()

    def _take(
        self, image: ImageLike, config: ImageConfig = DEFAULT, *, source: str | None = None
    ) -> Image.Image:
        """In place of the cache's own decoding: what was decoded for it already."""
        with self._lock:
            decoded = self._decoded.pop(self.features.key(image), None)
        return self._decode(image, config, source) if decoded is None else decoded

    def _decode(self, image: ImageLike, config: ImageConfig, source: str | None = None) -> Image.Image:
        limits, worker = self.limits, self._workers.get()
        bounded = replace(
            config,
            max_pixels=min(config.max_pixels, limits.image_pixels),
            max_bytes=min(config.max_bytes, limits.body_bytes),
            max_seconds=min(config.max_seconds, limits.image_seconds),
        )
        try:
            return worker.load(image, bounded, source=source)
        finally:
            self._workers.put(worker)
