"""The bodies of requests, as pydantic checks them: OpenAI's chat completions, scores, decisions, vLLM's loading.

A field that the server does not honour is here with the values at which it asks for nothing (`Only`); any other value,
and any other field, is refused by name.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, GetCoreSchemaHandler, Tag
from pydantic_core import CoreSchema, core_schema

MODEL_NAME = r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}$"
ModelName = Annotated[str, Field(pattern=MODEL_NAME)]
INT64 = 2**63 - 1
MOST = 1000
"""Entries of one list: a body of a million is refused before they are looked at."""


class Only:
    """Of a field that may only have one of these values, or none."""

    def __init__(self, *defaults: Any):
        self.defaults = defaults

    def check(self, value: Any) -> Any:
        same = [
            each
            for each in self.defaults
            if (each, isinstance(each, bool)) == (value, isinstance(value, bool))
        ]
        if value is not None and not same:
            instead = "".join(f" or send {each!r}" for each in self.defaults)
            raise ValueError(f"this server does not honour it; leave it out{instead}")
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, *_: Any) -> dict[str, Any]:
        return {"enum": [None, *self.defaults]}


NotHonoured = Annotated[Any, Only()]
"""A field of OpenAI's that may be null."""


class Strict(BaseModel):
    """No conversions, no unknown fields."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ImageUrl(Strict):
    url: str
    """``data:image/...;base64,...``"""
    detail: Annotated[Any, Only("auto")] = None


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


def _kind_of_content(content: Any) -> str:
    return "plain" if isinstance(content, str) else "parts"


Content = Annotated[
    Annotated[str, Tag("plain")] | Annotated[list[Part], Tag("parts"), Field(min_length=1, max_length=MOST)],
    Discriminator(_kind_of_content),
]


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: NotHonoured = None
    refusal: NotHonoured = None
    audio: NotHonoured = None
    annotations: Annotated[Any, Only([])] = None
    tool_calls: Annotated[Any, Only([])] = None
    function_call: NotHonoured = None
    reasoning_content: NotHonoured = None
    type: Annotated[Any, Only("text")] = None
    """lm-eval sends it with every message."""


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: Annotated[Any, Only(False)] = None


class Asked(Strict):
    """A conversation and who answers it."""

    model: ModelName
    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST)]


class ResponseFormat(Strict):
    type: Literal["text"]


class ChatRequest(Asked):
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=INT64)] | None = None
    """Of vLLM; -1 and 0 are all tokens."""
    seed: Annotated[int, Field(ge=-INT64 - 1, le=INT64)] | None = None
    stop: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=4)]
        | None
    ) = None
    n: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    user: str | None = None
    """A label, as ``safety_identifier`` and ``prompt_cache_key``: it asks for nothing."""
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    response_format: ResponseFormat | None = None
    audio: NotHonoured = None
    best_of: Annotated[Any, Only(1)] = None
    frequency_penalty: Annotated[Any, Only(0)] = None
    function_call: Annotated[Any, Only("none")] = None
    functions: Annotated[Any, Only([])] = None
    logit_bias: Annotated[Any, Only({})] = None
    metadata: Annotated[Any, Only({})] = None
    min_p: Annotated[Any, Only(0)] = None
    modalities: Annotated[Any, Only(["text"])] = None
    moderation: NotHonoured = None
    parallel_tool_calls: Annotated[Any, Only(True, False)] = None
    prediction: NotHonoured = None
    presence_penalty: Annotated[Any, Only(0)] = None
    prompt_cache_retention: NotHonoured = None
    reasoning_effort: Annotated[Any, Only("none")] = None
    repetition_penalty: Annotated[Any, Only(1)] = None
    service_tier: Annotated[Any, Only("auto", "default")] = None
    store: Annotated[Any, Only(False)] = None
    tool_choice: Annotated[Any, Only("none", "auto")] = None
    tools: Annotated[Any, Only([])] = None
    verbosity: NotHonoured = None
    web_search_options: NotHonoured = None


class ScoreRequest(Asked):
    """Which of the choices the assistant would say next."""

    choices: Annotated[list[str], Field(min_length=2)]


class Asset(Strict):
    """An image of a request for decisions."""

    type: Literal["image"]
    format: str | None = None
    data_base64: str


class ChoiceQuestion(Strict):
    type: Literal["choice"]
    instructions: str | dict[str, Any] | list[Any] | None = None
    criteria: Annotated[dict[str, Any], Field(min_length=1)]
    """Option -> its description, or null."""


class ScoreQuestion(Strict):
    type: Literal["score"]
    instructions: str | dict[str, Any] | list[Any] | None = None
    criteria: Annotated[list[Any], Field(min_length=1)]
    """The levels, the lowest first."""


class NoulCriteria(Strict):
    true: Any = None
    false: Any = None


class NoulQuestion(Strict):
    type: Literal["noul"]
    instructions: str | dict[str, Any] | list[Any] | None = None
    criteria: NoulCriteria | None = None


Question = Annotated[ChoiceQuestion | ScoreQuestion | NoulQuestion, Field(discriminator="type")]


class DecisionRequest(Strict):
    """System One: typed questions about a state."""

    model: ModelName
    state: str | dict[str, Any] | list[Any]
    questions: Annotated[dict[str, Question], Field(min_length=1, max_length=MOST)]
    assets: Annotated[dict[str, Asset], Field(max_length=4)] = {}
    """Placeholder -> the image that stands wherever it is written."""


class LoadRequest(Strict):
    """As vLLM's ``/v1/load_lora_adapter``."""

    lora_name: ModelName
    lora_path: Annotated[str, Field(min_length=1)]
    load_inplace: bool = False
    """Whether it may take the place of one of this name."""
    is_3d_lora_weight: Annotated[Any, Only(False)] = None


class UnloadRequest(Strict):
    """As vLLM's ``/v1/unload_lora_adapter``."""

    lora_name: ModelName
    lora_int_id: NotHonoured = None
