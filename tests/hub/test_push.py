"""A folder goes to the Hub only as it was asked for; whatever is in the way leaves it where it is."""

from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError

from moejax.errors import UserError
from moejax.hub.push import check_name, push


class Hub:
    """Stands in for HfApi: what was called, and what goes wrong."""

    def __init__(self, private=True, error=None):
        self.calls, self.private, self.error = [], private, error

    def __call__(self):
        return self

    def create_repo(self, name, **how):
        if self.error is not None:
            raise self.error
        self.calls.append(("create", name, how))
        return f"hub/{name}"

    def model_info(self, name):
        return self

    def upload_folder(self, **what):
        self.calls.append(("upload", what["repo_id"], what["folder_path"]))


@pytest.fixture
def hub(monkeypatch):
    def stand_in(**of):
        made = Hub(**of)
        monkeypatch.setattr(huggingface_hub, "HfApi", made)
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        return made

    return stand_in


@pytest.mark.parametrize("public", [False, True])
def test_uploaded_as_asked(public, hub, tmp_path):
    api = hub(private=not public)
    assert push(tmp_path, "me/tuned", public=public) == "hub/me/tuned"
    assert api.calls == [("create", "me/tuned", {"private": not public, "exist_ok": True}), ("upload", "me/tuned", tmp_path)]


def test_nothing_goes_to_a_repository_that_others_see_unasked(hub, tmp_path):
    api = hub(private=False)
    with pytest.raises(UserError, match=r"--push me/tuned: that repository is there and public: give --public"):
        push(tmp_path, "me/tuned", public=False)
    assert [call[0] for call in api.calls] == ["create"]


def answer(status):
    return HfHubHTTPError("Forbidden", response=SimpleNamespace(status_code=status, headers={}, request=None))


@pytest.mark.parametrize(
    ("error", "message"),
    [(answer(401), "the token is not valid"), (answer(403), "the token may not write there"), (answer(500), r"Forbidden\."),
     (ConnectionError("no route"), r"could not be reached \(ConnectionError: no route\)")],
)  # fmt: skip
def test_what_is_in_the_way_is_one_message_and_the_folder_stays(error, message, hub, tmp_path):
    hub(error=error)
    with pytest.raises(UserError, match=rf"--push me/tuned: .*{message}.* is complete and stays\. Upload it later by: hf upload me/tuned"):
        push(tmp_path, "me/tuned", public=False)


def test_without_login_or_offline(hub, tmp_path, monkeypatch):
    api = hub()
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UserError, match=r"not logged in: run `hf auth login`, or set HF_TOKEN.* stays"):
        push(tmp_path, "me/tuned", public=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        push(tmp_path, "me/tuned", public=False)
    assert not api.calls


@pytest.mark.parametrize("name", ["tuned", "a/b/c", "me/", "me/-x-", "me/a b"])
def test_names_that_no_repository_has(name):
    with pytest.raises(UserError, match=rf"--push {name}: no name of a repository .*expected OWNER/NAME"):
        check_name(name)
