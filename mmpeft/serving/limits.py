"""What the server bounds: sizes, counts and times of requests, each refused by name beyond its limit."""

from dataclasses import dataclass, fields

from mmpeft.errors import RefusedError


@dataclass(frozen=True)
class Limits:
    """Nothing of a request is unbounded. Times are in seconds."""

    body_mb: float = 20.0
    """Largest body of a request, by its Content-Length and by the bytes that really come."""
    characters: int = 100_000
    """Of all texts of one question together."""
    images: int = 8
    """Images of one request."""
    image_pixels: int = 50_000_000
    """Largest image, width x height; the run's own limit may be lower."""
    image_seconds: float = 10.0
    """Longest that decoding one image may take."""
    new_tokens: int = 1024
    """Longest answer that may be asked for."""
    answers: int = 8
    """Largest ``n`` of a chat completion."""
    choices: int = 64
    """Answers that one question may choose among."""
    questions: int = 64
    """Questions of one request for decisions."""
    header_seconds: float = 10.0
    """From a connection's start, or its last answer, to the end of a request's headers."""
    body_seconds: float = 30.0
    """Until a request's body is there."""
    request_seconds: float = 300.0
    """Until a request's answer is whole, waiting included."""
    send_seconds: float = 30.0
    """That a client may take to read the next piece of a stream."""
    drain_seconds: float = 30.0
    """For requests under way when the server is told to stop."""

    def __post_init__(self):
        for name in (field.name for field in fields(self)):
            if not getattr(self, name) > 0:
                raise RefusedError(f"limits.{name} is {getattr(self, name)}; it must be above 0")

    @property
    def body_bytes(self) -> int:
        return int(self.body_mb * 2**20)
