"""/v1/chat/completions: answers are those of the run asked directly, and what cannot be answered is refused by name."""

import json

import pytest
from PIL import Image

from mmpeft.inference.requests import Request
from mmpeft.inference.sampling import Sampling
from tests.serving.conftest import METHODS, QUESTION, data_url, error_of, image_part
from tests.tiny import make_record

TURNS = [
    {"role": "user", "content": "is red a color?"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": QUESTION},
]


def events(answer) -> list[dict]:
    """The data of a stream, whose last event says that it is done."""
    lines = [line for line in answer.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


@pytest.mark.parametrize("model", ["base", "default", *METHODS])
def test_the_model_picks_the_finetune(served, alone, pictures, model):
    for image in (pictures[0], None):
        wanted = alone.ask(image, QUESTION, model, max_new_tokens=6, answer_by="generate")
        assert served.text(QUESTION, image, model=model) == wanted


def test_finetunes_differ(served, pictures):
    assert len({served.text(QUESTION, pictures[0], model=model) for model in METHODS}) > 4


def test_the_body_is_openais(served, pictures):
    body = served.chat(QUESTION, pictures[0], n=2, temperature=1.0).json()
    assert body["object"] == "chat.completion"
    assert body["model"] == "default"
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    for choice in body["choices"]:
        assert choice["message"]["role"] == "assistant"
        assert choice["finish_reason"] in ("stop", "length")
        assert choice["logprobs"] is None
    usage = body["usage"]
    assert usage["prompt_tokens"] > 4
    assert 0 <= usage["completion_tokens"] <= 12
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_is_the_whole_answer_in_pieces(served, pictures, n):
    how = {"n": n, "seed": 3, "temperature": 1.0, "max_tokens": 12}
    whole = served.chat(QUESTION, pictures[1], **how).json()
    chunks = events(
        served.chat(QUESTION, pictures[1], stream=True, stream_options={"include_usage": True}, **how)
    )
    *told, last = chunks
    assert last["choices"] == []
    assert last["usage"] == whole["usage"] | {"prompt_tokens_details": last["usage"]["prompt_tokens_details"]}
    assert {chunk["usage"] for chunk in told} == {None}
    assert len({chunk["id"] for chunk in chunks}) == 1
    for index, choice in enumerate(whole["choices"]):
        own = [each for chunk in told for each in chunk["choices"] if each["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(each["delta"].get("content", "") for each in own) == choice["message"]["content"]
        assert [each["finish_reason"] for each in own] == [None] * (len(own) - 1) + [choice["finish_reason"]]


def test_a_seed_gives_the_same_again_and_each_of_n_another(served):
    how = {"temperature": 1.5, "max_tokens": 12, "n": 3}
    first, again, other = (
        [
            choice["message"]["content"]
            for choice in served.chat("name a color", seed=seed, **how).json()["choices"]
        ]
        for seed in (7, 7, 8)
    )
    assert first == again
    assert first[1:] == other[:2], "the seeds of n answers count up"
    assert len(set(first)) == 3
    unseeded = {served.text("name a color", temperature=1.5, max_tokens=12) for _ in range(4)}
    assert len(unseeded) > 1


@pytest.mark.parametrize("seed", [2**63 - 1, -(2**63), 0])
def test_every_seed_counts_up(served, seed):
    assert served.chat("name a color", seed=seed, temperature=1.0, n=2, max_tokens=2).status_code == 200


def test_stop_and_length_end_an_answer(served):
    whole = served.text("name a color", max_tokens=20)
    assert served.chat("name a color", max_tokens=3).json()["choices"][0]["finish_reason"] == "length"
    stop = whole[len(whole) // 2 : len(whole) // 2 + 2]
    choice = served.chat("name a color", max_tokens=20, stop=["no such text", stop]).json()["choices"][0]
    assert choice["message"]["content"] == whole[: whole.index(stop)].strip() or not whole.strip()
    assert choice["finish_reason"] == "stop"
    assert served.text("name a color", max_completion_tokens=3, max_tokens=None) == served.text(
        "name a color", max_tokens=3
    )


def test_a_conversation_and_its_system_turn_are_read_as_in_training(served, alone):
    record = make_record() | {"turns": [("is red a color?", "yes"), (QUESTION, None)], "task": "vqa"}
    for system in (None, "Be brief."):
        own = record | ({"system": system} if system else {})
        (wanted,) = alone.answer([Request(own, "lora-a", sampling=Sampling(8))])
        messages = [{"role": "system", "content": system}, *TURNS] if system else TURNS
        body = {"model": "lora-a", "messages": messages, "max_tokens": 8}
        answer = served.client.post("/v1/chat/completions", json=body)
        assert answer.json()["choices"][0]["message"]["content"] == wanted.text


def test_images_stand_where_they_are_sent(served, alone, pictures):
    parts = [image_part(pictures[0]), {"type": "text", "text": "and"}, image_part(pictures[5])]
    body = {"model": "lora-b", "messages": [{"role": "user", "content": parts}], "max_tokens": 8}
    answer = served.client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
    images = (str(pictures[0]), str(pictures[5]))
    assert answer == alone.ask(images, "<image>and<image>", "lora-b", 8, answer_by="generate")


def test_logprobs_are_those_of_the_model(served, alone, pictures):
    how = {"logprobs": True, "top_logprobs": 3, "max_tokens": 4, "model": "ia3-a"}
    choice = served.chat(QUESTION, pictures[0], **how).json()["choices"][0]
    told = choice["logprobs"]["content"]
    assert "".join(each["token"] for each in told).strip() == choice["message"]["content"]
    for each in told:
        assert each["logprob"] <= 0
        assert each["top_logprobs"][0]["logprob"] == each["logprob"], "greedy takes the likeliest"
        assert len(each["top_logprobs"]) == 3
        assert each["bytes"] in (list(each["token"].encode()), None)
    chunks = events(served.chat(QUESTION, pictures[0], stream=True, **how))
    streamed = [
        own for chunk in chunks for c in chunk["choices"] if c["logprobs"] for own in c["logprobs"]["content"]
    ]
    assert streamed == told


ODD_TEXTS = ["a\0b", "\U0001f600" * 40, "\u202eabc\u2028", "e\u0301", "</s>[INST] a [/INST]"]


@pytest.mark.parametrize("question", ODD_TEXTS, ids=range(len(ODD_TEXTS)))
def test_any_text_is_asked_as_it_is_and_streams_all_at_once(served, alone, question):
    how = {"n": 2, "stop": ["no such text", "zz"], "logprobs": True, "top_logprobs": 0, "max_tokens": 8}
    whole = served.chat(question, model="lora-a", **how).json()
    wanted = alone.ask(None, question, "lora-a", 8, answer_by="generate")
    for index, choice in enumerate(whole["choices"]):
        assert choice["message"]["content"] == wanted
        told = [
            each
            for chunk in events(served.chat(question, model="lora-a", stream=True, **how))
            for each in chunk["choices"]
            if each["index"] == index
        ]
        assert "".join(each["delta"].get("content", "") for each in told).strip() == wanted
        logprobs = [own for each in told if each["logprobs"] for own in each["logprobs"]["content"]]
        wanted_logprobs = choice["logprobs"]["content"]
        assert [own["token"] for own in logprobs] == [own["token"] for own in wanted_logprobs]
        assert [own["logprob"] for own in logprobs] == pytest.approx(
            [own["logprob"] for own in wanted_logprobs], abs=1e-5
        )


ASKED_FOR_NOTHING = {
    "presence_penalty": 0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "logit_bias": {},
    "response_format": {"type": "text"},
    "tools": [],
    "tool_choice": "none",
    "parallel_tool_calls": True,
    "modalities": ["text"],
    "store": False,
    "service_tier": "auto",
    "top_k": -1,
    "n": None,
    "seed": None,
    "stop": None,
    "user": "me",
}
NOT_HONOURED = {
    "presence_penalty": 0.5,
    "frequency_penalty": 1,
    "repetition_penalty": 1.1,
    "logit_bias": {"5": 100},
    "response_format": {"type": "json_object"},
    "tools": [{"type": "function"}],
    "reasoning_effort": "high",
    "store": True,
    "best_of": 2,
    "min_p": 0.1,
    "n": 10**9,
    "max_tokens": 10**9,
    "temperature": -1,
    "top_p": 0,
    "top_k": -2,
    "top_logprobs": 2,
    "seed": 2**64,
    "stop": ["a", "b", "c", "d", "e"],
    "stream_options": {"include_usage": True},
    "guided_json": {},
    "presence_penalti": 0,
}


def test_fields_that_ask_for_nothing_change_nothing(served):
    assert served.text("name a color", **ASKED_FOR_NOTHING) == served.text("name a color")


@pytest.mark.parametrize("field", NOT_HONOURED)
def test_a_field_that_is_not_honoured_is_refused_by_name(served, field):
    answer = served.chat(**{field: NOT_HONOURED[field]})
    assert answer.status_code == 400
    error = error_of(answer)
    assert error["type"] == "invalid_request_error"
    assert error["param"].split(".")[0].split("[")[0] == field
    assert field in error["message"]


def message(content, role="user"):
    return {"role": role, "content": content}


REFUSED_MESSAGES = [
    ([], "messages"),
    ([message("a"), message("b")], "messages[1].role"),
    ([message("a", "assistant")], "messages[0].role"),
    ([message("a"), message("b", "assistant")], "messages"),
    ([message("a", "system")], "messages"),
    ([message("a", "system"), message("b", "system"), message("c")], "messages[1].role"),
    ([message("a", "tool")], "messages[0].role"),
    ([message(" ")], "messages[0].content"),
    ([message([])], "messages[0].content"),
    ([message("what is <image> here?")], "messages[0].content"),
    ([message("\ud800")], "messages[0].content"),
    ([message([{"type": "input_audio", "input_audio": {}}])], "messages[0].content[0]"),
    ([message([{"type": "text", "text": "a"}, {"type": "text"}])], "messages[0].content[1].text"),
    ([message("a") | {"name": "bob"}], "messages[0].name"),
    ([message("word " * 3000)], "messages"),
]


@pytest.mark.parametrize(("messages", "param"), REFUSED_MESSAGES, ids=range(len(REFUSED_MESSAGES)))
def test_a_conversation_that_cannot_be_read_is_refused_at_its_place(served, messages, param):
    body = json.dumps({"model": "default", "messages": messages})  # escapes what is no Unicode
    answer = served.client.post(
        "/v1/chat/completions", content=body, headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 400
    assert error_of(answer)["param"] == param


def png(width: int, height: int) -> bytes:
    """The header of an image of that size."""
    import io

    data = io.BytesIO()
    Image.new("1", (8, 8)).save(data, "PNG")
    raw = bytearray(data.getvalue())
    raw[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    import zlib

    raw[29:33] = zlib.crc32(raw[12:29]).to_bytes(4, "big")
    return bytes(raw)


BAD_IMAGES = {
    "https://example.com/a.png": "this server fetches nothing",
    "http://169.254.169.254/": "this server fetches nothing",
    "file:///etc/passwd": "this server fetches nothing",
    "/etc/passwd": "this server fetches nothing",
    "data:text/plain;base64,aGFsbG8=": "wanted an image",
    "data:image/png,abc": "not in base64",
    "data:image/png;base64,%%%": "no base64",
    "data:image/png;base64,": "empty",
    "data:image/png;base64,aGFsbG8=": "no image of a known format",
    data_url(png(0, 5)): "",
    data_url(png(20_000, 20_000)): "pixels",
}


@pytest.mark.parametrize("url", BAD_IMAGES, ids=[url[:40] for url in BAD_IMAGES])
def test_a_bad_image_is_refused_at_its_place(served, pictures, url):
    parts = [image_part(pictures[0]), {"type": "image_url", "image_url": {"url": url}}]
    answer = served.client.post(
        "/v1/chat/completions", json={"model": "default", "messages": [message(parts)]}
    )
    assert answer.status_code == 400
    error = error_of(answer)
    assert error["param"] == "messages[0].content[1].image_url.url"
    assert BAD_IMAGES[url] in error["message"]


def test_a_request_holds_so_many_images(served, pictures):
    parts = [image_part(pictures[0])] * 9
    answer = served.client.post(
        "/v1/chat/completions", json={"model": "default", "messages": [message(parts)]}
    )
    assert answer.status_code == 400
    assert error_of(answer)["param"] == "messages[0].content[8]"


BODIES = [
    b"",
    b"[]",
    b"{",
    b'{"model": "default", "messages": NaN}',
    b"[" * 100_000,
    b"\xff\xfe",
    b"1" * 5000,
    b'{"model": "base", "model": "default", "messages": [{"role": "user", "content": "a"}]}',
    b'{"model": "base", "messages": [{"role": "user", "content": "a", "content": "b"}]}',
]


@pytest.mark.parametrize("body", BODIES, ids=range(len(BODIES)))
def test_a_body_that_is_no_request_is_refused(served, body):
    answer = served.client.post(
        "/v1/chat/completions", content=body, headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 400
    error_of(answer)


@pytest.mark.parametrize(
    ("model", "status"), [("nobody", 404), ("../default", 400), ("", 400), (".a", 400), ("a" * 65, 400)]
)
def test_an_unknown_model_is_never_the_base(served, model, status):
    answer = served.chat(model=model)
    assert answer.status_code == status
    assert error_of(answer)["param"] == "model"
    assert (error_of(answer)["code"] == "model_not_found") == (status == 404)


def test_models_are_listed_with_root_and_parent(served):
    listed = served.client.get("/v1/models").json()
    assert listed["object"] == "list"
    by_id = {own["id"]: own for own in listed["data"]}
    assert by_id.keys() == {"base", "default", *METHODS}
    assert by_id["base"]["parent"] is None
    assert by_id["ia3-a"]["parent"] == "base"
    assert len({own["root"] for own in listed["data"]}) == 1
    assert served.client.get("/v1/models/ia3-a").json() == by_id["ia3-a"]
    assert served.client.get("/v1/models/nobody").status_code == 404


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nowhere", 404), ("GET", "/v1/score", 405), ("POST", "/v1/nowhere", 404)],
)
def test_unknown_paths_and_methods_have_openais_error(served, method, path, status):
    answer = served.client.request(method, path)
    assert answer.status_code == status
    error_of(answer)


def test_health_and_metrics(served):
    served.text()
    assert served.client.get("/health").json() == {"status": "ok"}
    page = served.client.get("/metrics").text
    assert 'mmpeft_requests_total{endpoint="/v1/chat/completions",status="200"}' in page
    assert "mmpeft_engine_waiting 0.0" in page
    assert "mmpeft_first_token_seconds_count" in page
    assert not any(name in page for name in METHODS)
