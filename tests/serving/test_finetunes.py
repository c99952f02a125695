"""Finetunes that come and go over HTTP, and keys: who may ask what, and who may load."""

import json
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmpeft.adapters import LoraConfig
from mmpeft.errors import RefusedError
from mmpeft.serving.keys import Keys, Tenant, read_keys
from tests.serving.conftest import QUESTION, error_of, running

ADMIN, ALICE, BOB = "sk-admin-0123456789", "sk-alice-0123456789", "sk-bob-0123456789"
FILE = f"""
admin: {ADMIN}
tenants:
  alice: {{key: {ALICE}, finetunes: [lora-a, base]}}
  bob: {{key: {BOB}, finetunes: all}}
"""


@pytest.fixture(scope="module")
def keyed(tiny_run, tmp_path_factory):
    """A server with keys, its client without one."""
    path = tmp_path_factory.mktemp("keys") / "keys.yaml"
    path.write_text(FILE)
    with running(tiny_run, keys=read_keys(path)) as server:
        yield server


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def load(served, name, folder, key=ADMIN, **fields):
    body = {"lora_name": name, "lora_path": str(folder)} | fields
    return served.client.post("/v1/load_lora_adapter", json=body, headers=bearer(key))


def unload(served, name, key=ADMIN):
    return served.client.post("/v1/unload_lora_adapter", json={"lora_name": name}, headers=bearer(key))


def ask(served, model, key=ADMIN, **fields):
    body = {"model": model, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 6} | fields
    return served.client.post("/v1/chat/completions", json=body, headers=bearer(key))


def text(answer) -> str:
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]


@pytest.fixture
def loaded(keyed, folders):
    """lora-a and ia3-a are there."""
    for name in ("lora-a", "ia3-a"):
        answer = load(keyed, name, folders[name])
        assert answer.status_code == 200
        assert answer.text == f"Success: LoRA adapter '{name}' added successfully."
    yield keyed
    for name in ("lora-a", "ia3-a"):
        unload(keyed, name)


def test_a_finetune_is_loaded_replaced_and_unloaded(loaded, alone, folders):
    wanted = {
        name: alone.ask(None, QUESTION, name, 6, answer_by="generate")
        for name in ("lora-a", "ia3-a", "bias-a")
    }
    assert wanted["lora-a"] != wanted["bias-a"]
    assert text(ask(loaded, "lora-a")) == wanted["lora-a"]
    again = load(loaded, "lora-a", folders["bias-a"])
    assert again.status_code == 400
    assert "already been loaded" in error_of(again)["message"]
    assert load(loaded, "lora-a", folders["bias-a"], load_inplace=True).status_code == 200
    assert text(ask(loaded, "lora-a")) == wanted["bias-a"]
    assert text(ask(loaded, "ia3-a")) == wanted["ia3-a"]
    assert unload(loaded, "lora-a").status_code == 200
    assert ask(loaded, "lora-a").status_code == 404
    assert unload(loaded, "lora-a").status_code == 404
    assert text(ask(loaded, "ia3-a")) == wanted["ia3-a"]


def test_a_finetune_of_a_run_brings_its_projector(loaded, tiny_run, alone, pictures):
    for folder in (tiny_run, tiny_run / "adapters" / "default"):
        assert load(loaded, "same", folder).status_code == 200
        content = [
            {"type": "image_url", "image_url": {"url": _url(pictures[0])}},
            {"type": "text", "text": QUESTION},
        ]
        body = {"messages": [{"role": "user", "content": content}]}
        assert text(ask(loaded, "same", **body)) == alone.ask(
            pictures[0], QUESTION, "default", 6, answer_by="generate"
        )
        assert unload(loaded, "same").status_code == 200


def _url(image):
    from tests.serving.conftest import data_url

    return data_url(image)


def test_the_finetunes_of_a_run_on_another_base_are_refused(loaded, tiny_run, tmp_path):
    import shutil

    other = shutil.copytree(tiny_run, tmp_path / "other")
    manifest = json.loads((other / "mmpeft.json").read_text())
    manifest["identity"]["language"]["weights"] = "another"
    (other / "mmpeft.json").write_text(json.dumps(manifest))
    for folder in (other, other / "adapters" / "default"):
        answer = load(loaded, "other", folder)
        assert answer.status_code == 400
        assert "does not belong to this base" in error_of(answer)["message"]


def _nan(tensors):
    key = min(tensors)
    return tensors | {key: torch.full_like(tensors[key], torch.nan)}


DAMAGES = {
    "holds NaN": _nan,
    "are missing": lambda tensors: dict(list(tensors.items())[1:]),
    "are unexpected": lambda tensors: tensors | {"base_model.model.nowhere.lora_A.weight": torch.zeros(2, 2)},
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_finetune_is_refused_and_harms_nobody(loaded, folders, tmp_path, damage):
    import shutil

    before = text(ask(loaded, "ia3-a"))
    folder = shutil.copytree(folders["lora-b"], tmp_path / "bad")
    weights = folder / "adapter_model.safetensors"
    save_file(DAMAGES[damage](load_file(weights)), weights)
    answer = load(loaded, "bad", folder)
    assert answer.status_code == 400
    assert damage in error_of(answer)["message"]
    assert error_of(answer)["param"] == "lora_path"
    assert ask(loaded, "bad").status_code == 404
    assert text(ask(loaded, "ia3-a")) == before


def test_a_finetune_that_changes_nothing_is_refused(loaded, make_folders, tmp_path):
    folder = make_folders(tmp_path, {"fresh": LoraConfig(rank=2)}, False)["fresh"]
    answer = load(loaded, "fresh", folder)
    assert answer.status_code == 400
    assert "change nothing" in error_of(answer)["message"]


@pytest.mark.parametrize("name", ["../x", "a/b", "a\0", "", ".a", "x" * 65, "base"])
def test_a_name_that_no_finetune_may_have_is_refused(loaded, folders, name):
    answer = load(loaded, name, folders["lora-b"])
    assert answer.status_code == 400
    assert error_of(answer)["param"] == "lora_name"


@pytest.mark.parametrize("path", ["nowhere", "/etc", ""])
def test_a_folder_without_finetune_is_refused(loaded, path):
    assert load(loaded, "x", path).status_code == 400


def test_each_tenant_asks_its_own_finetunes_alone(loaded):
    listed = {
        key: {own["id"] for own in loaded.client.get("/v1/models", headers=bearer(key)).json()["data"]}
        for key in (ADMIN, ALICE, BOB)
    }
    everything = {"base", "default", "lora-a", "ia3-a"}
    assert listed == {ADMIN: everything, ALICE: {"base", "lora-a"}, BOB: everything}
    assert ask(loaded, "lora-a", ALICE).status_code == 200
    others, nobodys = ask(loaded, "ia3-a", ALICE), ask(loaded, "nobody", ALICE)
    assert others.status_code == nobodys.status_code == 404
    assert others.text.replace("ia3-a", "nobody") == nobodys.text
    assert loaded.client.get("/v1/models/ia3-a", headers=bearer(ALICE)).status_code == 404


WITHOUT_KEY = [{}, {"Authorization": "Bearer wrong-wrong-wrong"}, {"Authorization": f"Basic {ALICE}"}]


@pytest.mark.parametrize("header", WITHOUT_KEY)
@pytest.mark.parametrize("path", ["/v1/models", "/v1/chat/completions", "/v1/load_lora_adapter", "/v1/score"])
def test_without_a_key_nothing_is_answered(keyed, path, header):
    method = "GET" if path == "/v1/models" else "POST"
    answer = keyed.client.request(method, path, headers=header)
    assert answer.status_code == 401
    assert error_of(answer)["code"] == "invalid_api_key"


def test_health_and_metrics_need_no_key_and_name_nobody(loaded):
    assert loaded.client.get("/health").status_code == 200
    page = loaded.client.get("/metrics").text
    assert "alice" not in page
    assert "lora-a" not in page


def test_the_admin_alone_loads(loaded, folders, served):
    for key in (ALICE, BOB):
        assert load(loaded, "x", folders["lora-b"], key).status_code == 403
        assert unload(loaded, "lora-a", key).status_code == 403
    assert load(served, "x", folders["lora-b"]).status_code == 403, "a server without keys has no admin"


def test_every_key_is_compared_in_constant_time(monkeypatch):
    compared = []
    monkeypatch.setattr(
        "mmpeft.serving.keys.hmac.compare_digest", lambda a, b: compared.append((a, b)) or a == b
    )
    keys = Keys([(bytes([n]) * 32, Tenant(str(n))) for n in range(5)])
    with pytest.raises(RefusedError, match="No valid API key"):
        keys.tenant("Bearer something")
    assert len(compared) == 5
    assert {len(sent) for _, sent in compared} == {32}


BAD_FILES = {
    "": "wanted the fields admin, tenants",
    "[]": "wanted the fields admin, tenants",
    "{}": "has no key",
    "a: b: c": "is no YAML",
    "admins: x": "no field 'admins'",
    "admin: short": "at least 16",
    "admin: 12345678901234567890": "must be a text",
    f"tenants: {{a: {{key: {ALICE}}}}}": "finetunes is None",
    f"tenants: {{a: {{key: {ALICE}, finetunes: x}}}}": "wanted a list of names, or all",
    f"tenants: {{a: {{key: {ALICE}, models: all}}}}": "no field 'models'",
    f"admin: {ALICE}\ntenants: {{a: {{key: {ALICE}, finetunes: all}}}}": "has the key of another",
    "tenants: [a]": "found list",
}


@pytest.mark.parametrize("content", BAD_FILES, ids=range(len(BAD_FILES)))
def test_a_file_of_keys_that_says_something_else_is_refused(tmp_path, content):
    (tmp_path / "keys.yaml").write_text(content)
    with pytest.raises(RefusedError, match=BAD_FILES[content]):
        read_keys(tmp_path / "keys.yaml")
    with pytest.raises(RefusedError, match="no such file"):
        read_keys(tmp_path / "gone.yaml")


def test_loading_and_replacing_under_load_mixes_nothing(loaded, alone, folders):
    """Every answer is one of the two finetunes that the name meant, and every one of the others its own."""
    names = ("lora-b", "bias-b")
    wanted = {name: alone.ask(None, QUESTION, name, 6, answer_by="generate") for name in (*names, "ia3-a")}
    assert len(set(wanted.values())) == 3
    assert load(loaded, "moving", folders[names[0]]).status_code == 200
    failures, done = [], threading.Event()

    def client(model, allowed):
        while not done.is_set():
            answer = ask(loaded, model)
            if answer.status_code != 200 or text(answer) not in allowed:
                failures.append(answer.text)

    threads = [
        threading.Thread(target=client, args=("moving", [wanted[name] for name in names])) for _ in range(3)
    ]
    threads += [threading.Thread(target=client, args=("ia3-a", [wanted["ia3-a"]])) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(12):
        assert load(loaded, "moving", folders[names[number % 2]], load_inplace=True).status_code == 200
        assert text(ask(loaded, "moving")) == wanted[names[number % 2]]
        assert load(loaded, f"passing{number}", folders["beside-a"]).status_code == 200
        assert unload(loaded, f"passing{number}").status_code == 200
    done.set()
    for thread in threads:
        thread.join()
    assert not failures
    assert unload(loaded, "moving").status_code == 200
