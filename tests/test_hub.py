"""What is pushed to the Hub loads from there, in another process; the real client talks to a Hub on loopback.

Each script runs in a process of its own, since the client reads its endpoint when it is imported.
"""

import http.client
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from hub_server import TOKEN, HubServer, Repo
from huggingface_hub import ModelCard

pytestmark = pytest.mark.skipif(
    huggingface_hub.__version__.startswith(("0.", "1.")), reason="the Hub on loopback speaks to huggingface_hub 2"
)
TESTS = Path(__file__).parent

_START = """
import json, os, sys
import torch
import transformers
from pathlib import Path

def show(**values):
    print(json.dumps(values))
"""
_MAKE = """
from conftest import SKIPS, add_eas, build_model, logits, make_inputs
from huggingface_hub import ModelCard
from tokenizers import Tokenizer, models
base = build_model("llama")
base.save_pretrained("base")
base = transformers.AutoModelForCausalLM.from_pretrained("base")
inputs = make_inputs("llama", "cpu")
model = add_eas(base, "llama", SKIPS["half"], "running")
"""
_PUSH = """
torch.save((inputs, logits(model, inputs)), "adapter.pt")
model.push_to_hub("me/adapter")
base.push_to_hub("me/base")
ModelCard("---\\nlicense: mit\\n---\\n# Base").push_to_hub("me/base")
base = transformers.AutoModelForCausalLM.from_pretrained("me/base")
model = add_eas(base, "llama", SKIPS["half"], "running").merge_and_unload()
torch.save((inputs, logits(model, inputs)), "model.pt")
model.push_to_hub("me/model")
model.push_to_hub("me/model", private=False)
words = {word: index for index, word in enumerate(["yes", "no", "[UNK]"])}
tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").push_to_hub("me/model")
model.push_to_hub("me/private", private=True, revision="v1", max_shard_size="20KB", commit_message="Half of it")
show(local=sorted(path.name for path in Path.cwd().iterdir()))
"""
_CHECK = """
def check(model, file):
    inputs, expected = torch.load(file)
    with torch.no_grad():
        actual = model(**inputs).logits
    assert torch.equal(actual, expected)
    return type(model).__name__
"""


class Client:
    """Runs scripts in one folder, with the Hub's client set to the server, and keeps what they print."""

    def __init__(self, hub: HubServer, folder: Path) -> None:
        self.hub, self.folder, self.output = hub, folder, ""
        self.temporary = folder / "tmp"
        self.temporary.mkdir()

    def start(self, script: str, *arguments: str, token: str | None = TOKEN, **variables: str):
        environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        environment |= self.hub.environment(self.folder / "home", token)
        environment |= {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]), "TMPDIR": str(self.temporary)}
        environment |= {"HF_HUB_VERBOSITY": "debug", "TRANSFORMERS_VERBOSITY": "debug", **variables}
        result = subprocess.run(
            [sys.executable, "-c", _START + script, *arguments],
            capture_output=True, text=True, timeout=300, cwd=self.folder, env=environment,
        )  # fmt: skip
        self.output += result.stdout + result.stderr
        return result

    def run(self, script: str, *arguments: str, **options) -> dict:
        """What the script shows last."""
        result = self.start(script, *arguments, **options)
        assert result.returncode == 0, result.stderr[-3000:]
        return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture
def client(tmp_path):
    """A server without anything on it."""
    with HubServer() as hub:
        yield Client(hub, tmp_path)


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """A server with an adapter and merged models on it."""
    with HubServer() as hub:
        client = Client(hub, tmp_path_factory.mktemp("pushed"))
        client.shown = client.run(_MAKE + _PUSH)
        yield client


def test_the_server_is_strict():
    """Tokens, ranges and what is not there, as on the Hub."""
    with HubServer() as hub:
        hub.repos["me/it"] = Repo(private=True)
        commit = hub.repos["me/it"].commit("main", {"a.txt": b"0123456789", "a.bin": b"0123456789"}, "first")

        def ask(path, token=TOKEN, **headers):
            connection = http.client.HTTPConnection(hub.url.removeprefix("http://"))
            connection.request("GET", path, headers=headers | ({"Authorization": f"Bearer {token}"} if token else {}))
            answer = connection.getresponse()
            return SimpleNamespace(status=answer.status, headers=answer.headers, content=answer.read())

        found = ask("/me/it/resolve/main/a.txt", Range="bytes=2-4")
        assert (found.status, found.content) == (206, b"234")
        assert (found.headers["X-Repo-Commit"], found.headers["Content-Range"]) == (commit, "bytes 2-4/10")
        large = ask(f"/me/it/resolve/{commit}/a.bin")
        assert (large.status, large.headers["X-Linked-Size"]) == (302, "10")
        assert large.headers["Location"].startswith(f"http://{hub.storage_host}/storage/")
        for path, status, code in (
            ("/me/it/resolve/main/b.txt", 404, "EntryNotFound"),
            ("/me/it/resolve/v2/a.txt", 404, "RevisionNotFound"),
            ("/me/other/resolve/main/a.txt", 404, "RepoNotFound"),
        ):
            answer = ask(path)
            assert (answer.status, answer.headers["X-Error-Code"]) == (status, code)
        assert ask("/me/it/resolve/main/a.txt", token=None).headers["X-Error-Code"] == "RepoNotFound"
        wrong = ask("/api/whoami-v2", token="hf_Wrong")
        assert (wrong.status, json.loads(ask("/api/whoami-v2").content)["name"]) == (401, "me")
        assert wrong.headers["X-Error-Message"] == "Invalid credentials in Authorization header"
        assert ask("/api/nothing").status == 501


def test_adapter(pushed):
    script = """
import peft_eas
from peft import AutoPeftModelForCausalLM, PeftModel
base = transformers.AutoModelForCausalLM.from_pretrained("base")
check(PeftModel.from_pretrained(base, "me/adapter"), "adapter.pt")
check(AutoPeftModelForCausalLM.from_pretrained("me/adapter"), "adapter.pt")
show(checked=True)
"""
    assert pushed.run(_CHECK + script) == {"checked": True}


def test_merged_model(pushed):
    """From the default branch, from another, and by the hash of a commit."""
    script = """
import peft_eas
load = transformers.AutoModelForCausalLM.from_pretrained
models = [load("me/model"), load("me/private", revision="v1"), load("me/private", revision=sys.argv[1])]
words = transformers.AutoTokenizer.from_pretrained("me/model")
show(kinds=[check(model, "model.pt") for model in models], token=words("no")["input_ids"])
"""
    shown = pushed.run(_CHECK + script, pushed.hub.repos["me/private"].branches["v1"])
    assert shown == {"kinds": ["EASLlamaForCausalLM"] * 3, "token": [1]}


def test_merged_model_without_the_package(pushed):
    """By the code that was pushed with it; and so again for a copy that is pushed by someone without the package."""
    script = """
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
kind = check(model, "model.pt")
if sys.argv[1] != "me/copy":
    model.push_to_hub("me/copy")
show(kind=kind, imported="peft_eas" in sys.modules)
"""
    expected = {"kind": "EASLlamaForCausalLM", "imported": False}
    assert pushed.run(_CHECK + script, "me/model") == expected
    assert pushed.run(_CHECK + script, "me/copy", HF_HOME=str(pushed.folder / "other_home")) == expected
    with_package = "import peft_eas\nload = transformers.AutoModelForCausalLM.from_pretrained\n"
    with_package += 'show(kind=check(load("me/copy"), "model.pt"))'
    assert pushed.run(_CHECK + with_package) == {"kind": "EASLlamaForCausalLM"}


def test_what_is_stored(pushed):
    files, shards = pushed.hub.files("me/model"), pushed.hub.files("me/private", "v1")
    assert {"config.json", "generation_config.json", "model.safetensors", "README.md"} <= files.keys()
    assert {"tokenizer.json", "tokenizer_config.json"} <= files.keys()
    assert set(pushed.hub.files("me/adapter")) == {
        ".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors", "eas_skip_map.png",
    }  # fmt: skip
    assert sum(path.endswith(".safetensors") for path in shards) > 2
    assert "model.safetensors.index.json" in shards
    private = pushed.hub.repos["me/private"]
    assert private.private
    assert not pushed.hub.repos["me/model"].private
    assert private.at("v1").message == "Half of it"
    assert set(private.at("main").files) == {".gitattributes"}
    assert pushed.shown["local"] == ["adapter.pt", "base", "home", "model.pt", "tmp"]
    assert list(pushed.temporary.iterdir()) == []


def test_cards_are_ours(pushed):
    """push_to_hub puts an empty card in the place of the one that was saved; ours is what arrives."""
    for name, library, files in (
        ("me/adapter", "peft", pushed.hub.files("me/adapter")),
        ("me/model", "transformers", pushed.hub.files("me/model")),
        ("me/private", "transformers", pushed.hub.files("me/private", "v1")),
    ):
        card = ModelCard(files["README.md"].decode())
        assert card.data.library_name == library, name
        assert {"peft_eas", "efficient-attention-skipping", "arxiv:2403.15226"} <= set(card.data.tags)
        assert "model.layers.2.self_attn` | skipped" in card.text
        assert "More Information Needed" not in card.text
        assert "(eas_skip_map.png)" in card.text
        assert files["eas_skip_map.png"].startswith(b"\x89PNG")
        assert (card.data.base_model, card.data.license) == ((None, None) if library == "peft" else ("me/base", "mit"))


def test_card_that_was_edited_on_the_hub(client):
    """A second push updates our section and leaves the rest."""
    push = '\nmodel.push_to_hub("me/adapter")\nmodel.merge_and_unload().push_to_hub("me/model")\nshow()'
    client.run(_MAKE + push)
    for name in ("me/adapter", "me/model"):
        repo = client.hub.repos[name]
        card = repo.at("main").files["README.md"].decode()
        edited = card.replace("half", "").replace("\n---\n", "\nlanguage: en\n---\n", 1) + "\nMy own words.\n"
        repo.commit("main", {**repo.at("main").files, "README.md": edited.encode()}, "edit")
    client.run(_MAKE.replace('SKIPS["half"]', "[1]") + push)
    for name in ("me/adapter", "me/model"):
        card = ModelCard(client.hub.files(name)["README.md"].decode())
        assert card.text.rstrip().endswith("My own words.")
        assert card.data.language == "en"
        assert card.text.count("## Efficient Attention Skipping") == 1
        assert "`model.layers.1.self_attn` | skipped" in card.text
        assert "`model.layers.2.self_attn` | kept" in card.text


def test_trainer_pushes_the_card(client):
    """Trainer writes a card of its own over the adapter's."""
    script = """
from pathlib import Path
from training import make_trainer, SCHEDULE
from peft_eas import EASCallback
callback = EASCallback(strategy="bandit", **SCHEDULE)
trainer = make_trainer(Path("run"), callback, hub_model_id="me/trained", hub_strategy="end")
trainer.train()
trainer.push_to_hub()
show(scores=trainer.model.peft_config["default"].scores)
"""
    scores = client.run(script)["scores"]
    card = ModelCard(client.hub.files("me/trained")["README.md"].decode())
    assert card.data.library_name == "peft"
    assert "generated automatically according to the information the Trainer had access to" in card.text
    for name, score in scores.items():
        assert f"| `{name}` |" in card.text
        assert f"| {score:+.4f} |" in card.text
    assert json.loads(client.hub.files("me/trained")["adapter_config.json"])["scores"] == scores
    assert TOKEN not in client.output


def test_the_token_goes_to_the_hub_alone(pushed):
    """It is in no file, no log and no request's body, and the storage beside the Hub never sees it."""
    stored = [files for repo in pushed.hub.repos.values() for c in repo.commits.values() for files in c.files.items()]
    assert all(TOKEN.encode() not in content and TOKEN not in path for path, content in stored)
    assert all(TOKEN.encode() not in path.read_bytes() for path in pushed.folder.rglob("*") if path.is_file())
    assert TOKEN not in pushed.output
    at_storage = [request for request in pushed.hub.requests if request.host == pushed.hub.storage_host]
    assert {request.method for request in at_storage} == {"PUT", "GET"}
    assert all(request.authorization is None for request in at_storage)
    assert all(request.authorization in (None, f"Bearer {TOKEN}") for request in pushed.hub.requests)
    assert all(TOKEN not in request.path and TOKEN.encode() not in request.body for request in pushed.hub.requests)


def test_a_private_model_needs_the_token(pushed):
    script = 'import peft_eas\ntransformers.AutoModelForCausalLM.from_pretrained("me/private", revision="v1")'
    result = pushed.start(script, token=None, HF_HOME=str(pushed.folder / "home_of_another"))
    assert result.returncode != 0
    assert "me/private is not a local folder and is not a valid model identifier" in result.stderr


@pytest.mark.parametrize(
    ("token", "says"),
    [
        ("hf_WrongTokenOfTheTests", "401 Unauthorized|Invalid credentials in Authorization header"),
        (TOKEN, "403 Forbidden"),
    ],
)
def test_a_push_that_is_refused(token, says, client):
    """The client's own error comes through, and nothing is left behind, here or there."""
    client.hub.forbidden.add("me/closed")
    script = """
import re
from huggingface_hub.errors import HfHubHTTPError

def files():
    return {str(path) for path in Path.cwd().rglob("*") if "home" not in path.parts}

before, messages = files(), []
for name in ("me/closed", "others/model"):
    for pushed in (model, model.merge_and_unload() if name == "others/model" else None):
        if pushed is not None:
            try:
                pushed.push_to_hub(name)
            except HfHubHTTPError as error:
                messages.append(str(error))
            else:
                sys.exit(f"{name} took it")
show(new=sorted(files() - before), messages=messages)
"""
    shown = client.run(_MAKE + script, token=token)
    assert shown["new"] == []
    assert len(shown["messages"]) == 3
    assert all(re.search(says, message) for message in shown["messages"])
    assert client.hub.repos == client.hub.large_files == {}
    assert token not in client.output
