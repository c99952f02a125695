"""Clients that nobody here wrote work unchanged: openai's, litellm, lm-eval; schemathesis tries what is odd."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serving.conftest import METHODS, QUESTION, content


@pytest.fixture(scope="module")
def client(served):
    """The official client."""
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=f"{served.address}/v1", api_key="any", max_retries=0)


def asked(question=QUESTION, *images, **fields):
    messages = [{"role": "user", "content": content(question, *images)}]
    return {"model": "lora-a", "messages": messages, "max_completion_tokens": 6} | fields


def test_openai_lists_models(client):
    listed = client.models.list().data
    assert {own.id for own in listed} == {"base", "default", *METHODS}
    assert {own.parent for own in listed} == {None, "base"}
    assert client.models.retrieve("ia3-a").object == "model"


def test_openai_asks_with_images(client, alone, pictures):
    answer = client.chat.completions.create(**asked(QUESTION, pictures[0], pictures[1]))
    images = (str(pictures[0]), str(pictures[1]))
    assert answer.choices[0].message.content == alone.ask(images, QUESTION, "lora-a", 6, answer_by="generate")
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_an_answer_of_openais_client_goes_back_as_history(client):
    first = client.chat.completions.create(**asked("name a color", temperature=1, seed=1))
    history = [
        {"role": "user", "content": "name a color"},
        first.choices[0].message.model_dump() | {"content": "blue"},
        {"role": "user", "content": "is it?"},
    ]
    assert client.chat.completions.create(**asked(messages=history)).choices


def test_openai_streams(client, alone, pictures):
    wanted = alone.ask(pictures[0], QUESTION, "lora-a", 6, answer_by="generate")
    chunks = list(
        client.chat.completions.create(
            stream=True, stream_options={"include_usage": True}, **asked(QUESTION, pictures[0])
        )
    )
    assert "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices) == wanted
    assert chunks[-1].usage.completion_tokens >= 1


def test_openais_helper_of_streams(client):
    """It takes no answer that was cut at its length, so this one ends at a stop text."""
    whole = client.chat.completions.create(**asked("name a color")).choices[0].message.content
    how = asked("name a color", stop=whole[1:3], logprobs=True, top_logprobs=2)
    wanted = client.chat.completions.create(**how).choices[0]
    assert wanted.message.content
    with client.chat.completions.stream(**how) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion().choices[0]
    assert {"chunk", "content.delta", "content.done", "logprobs.content.delta"} <= kinds
    assert final.message.content == wanted.message.content
    told = wanted.logprobs.content
    assert all(len(each.top_logprobs) == 2 and each.logprob <= 0 for each in told)
    assert [each.logprob for each in final.logprobs.content] == [each.logprob for each in told]


def test_openai_knows_the_errors(client):
    openai = pytest.importorskip("openai")
    with pytest.raises(openai.NotFoundError) as told:
        client.chat.completions.create(**asked(model="nobody"))
    assert told.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="presence_penalty"):
        client.chat.completions.create(presence_penalty=1, **asked())


def test_openais_asynchronous_client_closes_a_stream(served):
    import asyncio

    openai = pytest.importorskip("openai")

    async def ask() -> None:
        async with openai.AsyncOpenAI(base_url=f"{served.address}/v1", api_key="any") as client:
            stream = await client.chat.completions.create(
                stream=True, **asked(max_completion_tokens=200, temperature=2)
            )
            async for _ in stream:
                break
            await stream.close()

    asyncio.run(ask())
    assert served.text() is not None


def test_litellm_asks_and_streams(served, alone, pictures, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # it would fetch prices
    litellm = pytest.importorskip("litellm")
    how = asked(
        QUESTION,
        pictures[0],
        model="openai/ia3-a",
        temperature=0,
        api_base=f"{served.address}/v1",
        api_key="any",
    )
    wanted = alone.ask(pictures[0], QUESTION, "ia3-a", 6, answer_by="generate")
    assert litellm.completion(**how).choices[0].message.content == wanted
    chunks = litellm.completion(stream=True, **how)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == wanted
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(**how | {"model": "openai/nobody"})


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Installs packages into an environment of their own, beside those that are here already; its Python."""

    def make(*packages: str) -> Path:
        folder = tmp_path_factory.mktemp("environment")
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        (own,) = folder.glob("lib/python*/site-packages")
        (own / "here.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
        python = folder / "bin" / "python"
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True, timeout=900)
        return python

    return make


@pytest.mark.slow
def test_schemathesis_finds_nothing(served, environment, tmp_path):
    """Odd requests of all kinds by the OpenAPI document: no server error, no status that is not documented."""
    python = environment("schemathesis>=4.32")
    document = served.client.get("/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/score", "/v1/systemone", "/v1/models", "/health"} <= document[
        "paths"
    ].keys()
    for schema in document["components"]["schemas"].values():
        if "model" in schema.get("properties", {}):  # else nearly all would be of unknown models
            schema["properties"]["model"] = {"type": "string", "enum": ["base", "lora-a"]}
    (tmp_path / "api.json").write_text(json.dumps(document))
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    done = subprocess.run(
        [
            *(python, "-c", "from schemathesis.cli import schemathesis; schemathesis()"),
            *("run", str(tmp_path / "api.json"), "--url", served.address),
            *(
                "--checks",
                f"{checks},negative_data_rejection",
                "--max-examples",
                "25",
                "--phases",
                "examples,fuzzing",
                "--seed",
                "1",
            ),
            *("--suppress-health-check", "all", "--request-timeout", "60"),
        ],
        capture_output=True,
        text=True,
        timeout=1500,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout[-6000:]


TASK = """
task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 6, temperature: 0}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.mark.slow
def test_lm_eval_runs_a_task(served, alone, environment, tmp_path):
    """Its scores are those of the answers asked directly."""
    python = environment("lm-eval[api]>=0.4.9")
    questions = ["is red a color?", "is two a color?", "name a color"]
    answers = [alone.ask(None, q, "lora-a", 6, answer_by="generate").split("\n")[0] for q in questions]
    rows = [
        {"question": q, "answer": a} for q, a in zip(questions, [*answers[:2], "no such answer"], strict=True)
    ]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "colours.yaml").write_text(TASK.format(data=tmp_path / "rows.json"))
    model = f"base_url={served.address}/v1/chat/completions,model=lora-a,num_concurrent=2,max_retries=1"
    subprocess.run(
        [
            *(python, "-m", "lm_eval", "--model", "local-chat-completions", "--model_args", model),
            *("--tasks", "colours", "--include_path", str(tmp_path), "--apply_chat_template"),
            *("--output_path", str(tmp_path / "out")),
        ],
        check=True,
        timeout=900,
    )
    (found,) = (tmp_path / "out").rglob("results*.json")
    assert json.loads(found.read_text())["results"]["colours"]["exact_match,none"] == pytest.approx(2 / 3)
