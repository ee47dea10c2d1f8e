"""Models to the hubs: what is sent, what is sent again, and who is told what goes wrong."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from safetensors.torch import save

from mergecli.formats.opening import open_source
from mergecli.hub.fetch import fetch
from mergecli.hub.push import push
from mergecli.merging.taskvector import taskvector
from mergecli.recipe.reading import recipe_of
from mergecli.runtime.errors import HubError, InputError, UsageError
from mergecli.storage.sources import parse_source
from tests.conftest import Run, World, random_weights
from tests.hub.conftest import Hubs
from tests.hub.servers import HuggingFaceServer, ModelScopeServer, Repository, drop, stall, status

PLACES = pytest.mark.parametrize("prefix", ["hf", "ms"])
CARD = "---\nbase_model: []\nlicense: mit\n---\n# ties\n"
FILES = ["README.md", "config.json", "model.safetensors"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's folder, with what is never pushed."""
    folder = tmp_path / "ties"
    folder.mkdir()
    (folder / "README.md").write_text(CARD)
    (folder / "config.json").write_text("{}\n")
    (folder / "model.safetensors").write_bytes(save(random_weights(3)))
    (folder / ".cache").mkdir()
    (folder / ".cache" / "secret").write_text("never sent")
    return folder


@pytest.fixture(autouse=True)
def token(hubs: Hubs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "ms-secret")
    hubs.hf.token = hubs.ms.token = "secret"


def hub_of(hubs: Hubs, prefix: str) -> HuggingFaceServer | ModelScopeServer:
    return hubs.hf if prefix == "hf" else hubs.ms


def there(hubs: Hubs, prefix: str, name: str = "org/ties", branch: str | None = None) -> dict[str, bytes]:
    """What a branch of a repository has."""
    repository: Repository = hub_of(hubs, prefix).repositories[name]
    return repository.commits[repository.branches[branch or repository.default]]


def test_residual_task_vectors_go_with_what_they_are_added_to(
    hubs: Hubs, tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "vectors"
    taskvector(recipe_of(world.files, base=world.base_file), output=folder, quantize=2, residual=True)
    push(folder, "hf:org/small", token_to_endpoint=True)
    assert "shared/mean.safetensors" in there(hubs, "hf", "org/small")
    source = f"hf:org/small#{next(iter(world.tuned))}.safetensors"
    fetch([source])
    with open_source(parse_source(source, Path())) as opened:
        assert opened.is_task_vector
    (folder / "shared/mean.safetensors").unlink()
    with pytest.raises(
        InputError, match=r"is a residual, and there is no .*shared/mean.safetensors to add it to"
    ):
        push(folder, "hf:org/other")


@PLACES
def test_a_new_repository_gets_the_files_of_the_folder_and_none_that_is_hidden(
    hubs: Hubs, prefix: str, folder: Path, run: Run
) -> None:
    ended = run("push", "ties", f"{prefix}:org/ties", "--token-to-endpoint")
    hub = hub_of(hubs, prefix)
    url = f"{hub.endpoint}/org/ties" if prefix == "hf" else f"{hub.endpoint}/models/org/ties"
    size = sum((folder / name).stat().st_size for name in FILES)
    assert (ended.status, ended.out) == (0, f"{url}\n")
    assert ended.end.startswith(f"pushed 3 files, {size:,} bytes")
    found = there(hubs, prefix)
    assert {name: found[name] for name in FILES} == {name: (folder / name).read_bytes() for name in FILES}
    assert set(found) <= {*FILES, ".gitattributes"}
    assert "org/ties" not in hub.private


@PLACES
def test_what_was_pushed_can_be_fetched(hubs: Hubs, prefix: str, folder: Path) -> None:
    push(folder, f"{prefix}:org/ties", private=True, token_to_endpoint=True)
    assert hub_of(hubs, prefix).private == {"org/ties"}
    (path,) = fetch(f"{prefix}:org/ties", token_to_endpoint=True).paths
    assert (path / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_modelscope_is_told_the_license_of_the_card_and_never_one_that_nobody_gave(
    hubs: Hubs, folder: Path
) -> None:
    push(folder, "ms:org/ties", token_to_endpoint=True)
    (folder / "README.md").write_text("# no front matter\n")
    push(folder, "ms:org/unknown", token_to_endpoint=True)
    assert [each["License"] for each in hubs.ms.created] == ["MIT", "Other"]


@PLACES
def test_a_dry_run_tells_what_differs_and_writes_nothing(
    hubs: Hubs, prefix: str, folder: Path, run: Run
) -> None:
    ended = run("push", "ties", f"{prefix}:org/ties", "--private", "--dry-run", "--token-to-endpoint")
    assert ended.status == 0, ended.err
    assert [line.split("\t")[::2] for line in ended.out.splitlines()] == [
        ["file", "state"], *([name, "new"] for name in FILES)
    ]  # fmt: skip
    assert "to a new private repository, " in ended.end
    assert "org/ties" not in hub_of(hubs, prefix).repositories
    assert {each.method for each in hub_of(hubs, prefix).requests} == {"GET"}
    push(folder, f"{prefix}:org/ties", token_to_endpoint=True)
    (folder / "config.json").write_text('{"new": 1}\n')
    done = push(folder, f"{prefix}:org/ties", dry_run=True, token_to_endpoint=True)
    assert [(each.path, each.state) for each in done.files] == [
        ("README.md", "same"), ("config.json", "changed"), ("model.safetensors", "same")
    ]  # fmt: skip
    assert (done.creates, done.private) == ("", False)


@PLACES
def test_nothing_is_sent_twice(hubs: Hubs, prefix: str, folder: Path, run: Run) -> None:
    assert run("push", "ties", f"{prefix}:org/ties", "--token-to-endpoint").status == 0
    hub = hub_of(hubs, prefix)
    before = len(hub.repositories["org/ties"].commits)
    hubs.forget()
    ended = run("push", "ties", f"{prefix}:org/ties", "--token-to-endpoint")
    assert ended.end.startswith("nothing differs: nothing was pushed")
    assert len(hub.repositories["org/ties"].commits) == before
    assert {each.method for each in hub.requests} == {"GET"}
    assert hub.cdn_requests == []


@PLACES
def test_shards_of_another_model_go_where_loaders_would_take_them(
    hubs: Hubs, prefix: str, folder: Path
) -> None:
    old = {
        "model.safetensors.index.json": b"{}",
        "model-0-00001-of-00001.safetensors": b"old",
        "notes.txt": b"mine",
    }
    branch = "main" if prefix == "hf" else "master"
    hub_of(hubs, prefix).repositories["org/ties"] = Repository(old, branch)
    done = push(folder, f"{prefix}:org/ties", token_to_endpoint=True)
    assert [each.path for each in done.files if each.state == "removed"] == sorted(old)[:2]
    assert set(there(hubs, prefix)) == {*FILES, "notes.txt"}


def test_a_branch_is_made_where_there_is_none(hubs: Hubs, folder: Path) -> None:
    push(folder, "hf:org/ties", token_to_endpoint=True)
    (folder / "config.json").write_text('{"new": 1}\n')
    done = push(folder, "hf:org/ties", revision="v2", token_to_endpoint=True)
    assert done.url == f"{hubs.hf.endpoint}/org/ties/tree/v2"
    assert done.creates == "branch"
    assert there(hubs, "hf")["config.json"] == b"{}\n"
    assert there(hubs, "hf", branch="v2")["config.json"] == b'{"new": 1}\n'


def test_modelscope_lets_no_program_make_a_branch(hubs: Hubs, folder: Path) -> None:
    push(folder, "ms:org/ties", token_to_endpoint=True)
    with pytest.raises(
        HubError, match="there is no branch `v2`; it has `master`\nhint: make it on the repository's"
    ):
        push(folder, "ms:org/ties", revision="v2", token_to_endpoint=True)


@PLACES
def test_an_interrupted_push_goes_on_with_what_has_not_arrived(
    hubs: Hubs, prefix: str, folder: Path, run: Run
) -> None:
    (folder / "more.safetensors").write_bytes(save(random_weights(4)))
    hub = hub_of(hubs, prefix)
    hub.misbehave("/commit/", status(403))
    ended = run("push", "ties", f"{prefix}:org/ties", "--token-to-endpoint")
    assert ended.status == 4
    assert "more.safetensors" not in there(hubs, prefix)
    assert len(hub.cdn_requests) == 2
    hubs.forget()
    ended = run("push", "ties", f"{prefix}:org/ties", "--token-to-endpoint")
    assert ended.status == 0, ended.err
    assert hub.cdn_requests == []
    assert there(hubs, prefix)["more.safetensors"] == (folder / "more.safetensors").read_bytes()


@PLACES
def test_ctrl_c_loses_no_file_that_has_arrived(hubs: Hubs, prefix: str, folder: Path, tmp_path: Path) -> None:
    (folder / "a.safetensors").write_bytes(save(random_weights(4)))
    hub = hub_of(hubs, prefix)
    second = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    hub.misbehave(f"/upload/{second}", stall(0, threading.Event()))
    command = ["push", "ties", f"{prefix}:org/ties", "--token-to-endpoint", "--jobs", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "mergecli", *command],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert hub.stalled.wait(30)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in err
    assert "3 of 4 files have arrived and are kept" in err
    hubs.forget()
    push(folder, f"{prefix}:org/ties", token_to_endpoint=True)
    assert [each.path for each in hub.cdn_requests] == [f"/upload/{second}"]
    assert there(hubs, prefix)["a.safetensors"] == (folder / "a.safetensors").read_bytes()


@PLACES
def test_a_file_that_is_cut_off_on_its_way_is_sent_again(
    hubs: Hubs, prefix: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    hub = hub_of(hubs, prefix)
    hub.misbehave("/upload/", status(503))
    hub.misbehave("/upload/", drop())
    push(folder, f"{prefix}:org/ties", token_to_endpoint=True)
    assert len(hub.cdn_requests) == 3
    assert there(hubs, prefix)["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_large_files_go_in_parts(hubs: Hubs, folder: Path) -> None:
    hubs.hf.part_size = 5000
    push(folder, "hf:org/ties", token_to_endpoint=True)
    assert len(hubs.hf.cdn_requests) == -(-(folder / "model.safetensors").stat().st_size // 5000)
    assert there(hubs, "hf")["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_progress_is_told_for_each_file_up_to_its_end(hubs: Hubs, folder: Path) -> None:
    told: list[tuple[str, int, int]] = []
    push(folder, "hf:org/ties", token_to_endpoint=True, progress=lambda *each: told.append(each))
    size = (folder / "model.safetensors").stat().st_size
    assert ("org/ties model.safetensors", size, size) in told
    assert told[0][0] == "reading the model"


@PLACES
def test_the_token_reaches_the_hub_alone(hubs: Hubs, prefix: str, folder: Path) -> None:
    hub = hub_of(hubs, prefix)
    hubs.hf.verify_endpoint = hubs.hf.cdn_endpoint  # a hub that has uploads confirmed elsewhere
    with pytest.raises(HubError):
        push(folder, f"{prefix}:org/ties")
    assert hub.requests == []
    push(folder, f"{prefix}:org/ties", token_to_endpoint=True)
    assert [each for each in hub.requests if "secret" not in each.token] == []
    assert [each for each in hub.cdn_requests if "secret" in each.token] == []
    assert hub.cdn_requests


MISTAKES = [
    ("no-token", "{0}: a token that may write is needed\nhint: set {1}, and `--token-to-endpoint` so that "),
    ("bad-token", "{0}: 127.0.0.1:{2} does not accept the token\nhint: check {1}, or make a new one"),
    ("no-org", "{3}:nobody/ties: you may make no repository under `nobody`"),
    ("forbidden", "{0}: you may not write to it: "),
    ("taken", "{0}: the name is taken, by a repository that you may not see\nhint: choose another name"),
    ("public", "{0}: is public already, and `--private` is for a new repository"),
    ("offline", "{0}: a push needs a network\nhint: HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set: unset it"),
    ("unreachable", "cannot reach 127.0.0.1:9: "),
]


@PLACES
@pytest.mark.parametrize(("what", "message"), MISTAKES, ids=[what for what, _ in MISTAKES])
def test_what_goes_wrong_is_told_with_its_cure(
    hubs: Hubs, prefix: str, folder: Path, run: Run, what: str, message: str
) -> None:
    hub = hub_of(hubs, prefix)
    variable = "HF_TOKEN" if prefix == "hf" else "MODELSCOPE_API_TOKEN"
    environment: dict[str, str] = {}
    target, options = f"{prefix}:org/ties", ["--token-to-endpoint"]
    branch = "main" if prefix == "hf" else "master"
    if what == "no-token":
        environment, options = {variable: ""}, []
    elif what == "bad-token":
        environment = {variable: "wrong"}
    elif what == "no-org":
        target = f"{prefix}:nobody/ties"
    elif what == "forbidden":
        hub.repositories["org/ties"] = Repository({"a.txt": b"a"}, branch)
        hub.writers = {"another"}
    elif what == "taken":
        part = "/api/models/org/ties" if prefix == "hf" else "/models/org/ties"
        hub.repositories["org/ties"] = Repository({"a.txt": b"a"}, branch)
        hub.hidden = {part}
    elif what == "public":
        hub.repositories["org/ties"] = Repository({"a.txt": b"a"}, branch)
        options.append("--private")
    elif what == "offline":
        environment = {"HF_HUB_OFFLINE": "1"}
    else:
        environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "MODELSCOPE_ENDPOINT": "http://127.0.0.1:9"}
    ended = run("push", "ties", target, *options, **environment)
    assert ended.status == 4
    assert ended.out == ""
    said = ended.err.replace("error: ", "", 1)
    assert said.startswith(message.format(f"{prefix}:org/ties", variable, hub.hub.server_port, prefix))
    assert "secret" not in ended.err


def test_an_owner_that_is_nearly_right_is_named(hubs: Hubs, folder: Path) -> None:
    with pytest.raises(HubError) as caught:
        push(folder, "hf:orgg/ties", token_to_endpoint=True)
    assert (
        caught.value.message == "hf:orgg/ties: you may make no repository under `orgg` (did you mean `org`?)"
    )
    assert caught.value.hint.endswith("with a token that may write; this one is that of `user`")


def test_a_card_that_the_hub_refuses_is_told_before_the_commit(hubs: Hubs, folder: Path) -> None:
    (folder / "README.md").write_text("---\nbase_model: ['toy:base']\n---\n")
    with pytest.raises(
        InputError, match='refuses its front matter: "base_model" with value "toy:base" is not valid'
    ):
        push(folder, "hf:org/ties", token_to_endpoint=True)


def test_what_the_hub_warns_of_is_a_note(hubs: Hubs, folder: Path, run: Run) -> None:
    (folder / "README.md").write_text("# ties\n")
    ended = run("push", "ties", "hf:org/ties", "--token-to-endpoint")
    assert "note: README.md: empty or missing yaml metadata in repo card\n" in ended.err


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("toy:base", "`toy:base`: expected `hf:org/name` or `ms:org/name`"),
        ("org/ties", "`org/ties`: expected `hf:org/name` or `ms:org/name`"),
        ("hf:ties", "`hf:ties`: expected `hf:org/name` or `ms:org/name`"),
        (
            "hf:datasets/org/ties",
            "`hf:datasets/org/ties`: is a data set: expected `hf:org/name` or `ms:org/name`",
        ),
        ("hf:org/ties@v1", "--revision v2: `hf:org/ties@v1` names another"),
    ],
)
def test_a_target_is_a_repository_of_a_hub(folder: Path, target: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        push(folder, target, revision="v2")
    assert caught.value.message == message


def test_a_folder_without_a_whole_model_is_refused(hubs: Hubs, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nosuch: no such folder"):
        push("nosuch", "hf:org/ties")
    with pytest.raises(InputError, match=r"config\.json: is a file, a model's folder was expected"):
        push(folder / "config.json", "hf:org/ties")
    (folder / "model.safetensors").write_bytes(save(random_weights(3))[:-4])
    with pytest.raises(InputError, match=r"model\.safetensors: "):
        push(folder, "hf:org/ties")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="ties: has no safetensors file"):
        push(folder, "hf:org/ties")
    assert hubs.asked == []


def test_the_hubs_library_is_as_it_was_after_a_push(hubs: Hubs, folder: Path) -> None:
    from huggingface_hub import constants
    from huggingface_hub.utils import _http, are_progress_bars_disabled, get_session

    factory, hooks = _http._GLOBAL_CLIENT_FACTORY, len(get_session().event_hooks["request"])
    quiet = are_progress_bars_disabled()  # other tests may have left them so
    push(folder, "hf:org/ties", token_to_endpoint=True)
    assert _http._GLOBAL_CLIENT_FACTORY is factory
    assert len(get_session().event_hooks["request"]) == hooks
    assert not constants.HF_HUB_DISABLE_TELEMETRY
    assert are_progress_bars_disabled() == quiet
    assert not [each for each in hubs.asked if "agent" in each]
