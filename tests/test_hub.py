"""The card that is pushed, on a Hub that is only recorded."""

import pytest

from h2s import hub as hub_module
from h2s.hub import push_adapter, write_card


@pytest.fixture
def hub(monkeypatch):
    """What was done to the Hub, the card as it went there."""
    done = []

    class Api:
        def __init__(self, token):
            pass

        def create_repo(self, name, private, exist_ok):
            repo = name if "/" in name else f"me/{name}"
            return type("Url", (str,), {"repo_id": repo})(f"https://huggingface.co/{repo}")

        def create_branch(self, repo_id, branch, exist_ok):
            done.append(("branch", repo_id, branch, exist_ok))

        def upload_folder(self, repo_id, folder_path, allow_patterns, revision, commit_message):
            card = (folder_path / "README.md").read_text(encoding="utf-8") if commit_message == "Card" else None
            done.append((commit_message, repo_id, revision, card))

    monkeypatch.setattr(hub_module, "HfApi", Api)
    return done


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "2026-run"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("reward", [False, True])
@pytest.mark.parametrize(("name", "repo"), [("you/kind", "you/kind"), ("kind", "me/kind"), (None, "me/2026-run")])
def test_the_pushed_card_loads_what_was_pushed(folder, hub, name, repo, reward):
    write_card(folder, "A prefix", "google/gemma-3-1b-it", "Measured.", reward)
    push_adapter(folder, "they/before", None, None, revision="old")  # a card may be pushed again, elsewhere
    hub.clear()
    assert push_adapter(folder, name, None, None) == f"https://huggingface.co/{repo}"
    assert [call[:3] for call in hub] == [("Adapter", repo, None), ("Card", repo, None)]
    card = hub[-1][-1]
    assert card.count(f'.from_pretrained("{repo}"') == card.count(".from_pretrained(") == 2
    assert "revision" not in card and card.count("num_labels=1") == reward


def test_a_card_that_is_not_pushed_loads_the_folder(folder):
    write_card(folder, "A prefix", "google/gemma-3-1b-it", "Measured.")
    assert (folder / "README.md").read_text(encoding="utf-8").count('.from_pretrained("2026-run")') == 2


def test_a_revision_is_pushed_to_and_loaded_from(folder, hub):
    """The branch is made where it is new."""
    write_card(folder, "A prefix", "google/gemma-3-1b-it", "Measured.", reward=True)
    push_adapter(folder, "you/kind", None, None, revision="second")
    branch, *uploads = hub
    assert branch == ("branch", "you/kind", "second", True)
    assert [call[:3] for call in uploads] == [("Adapter", "you/kind", "second"), ("Card", "you/kind", "second")]
    assert 'SequenceClassification.from_pretrained("you/kind", revision="second", num_labels=1)' in hub[-1][-1]
    assert 'AutoTokenizer.from_pretrained("you/kind", revision="second")' in hub[-1][-1]


def test_a_pull_request_is_no_branch_to_make(folder, hub):
    write_card(folder, "A prefix", "google/gemma-3-1b-it", "Measured.")
    push_adapter(folder, "you/kind", None, None, revision="refs/pr/1")
    assert [call[:3] for call in hub] == [("Adapter", "you/kind", "refs/pr/1"), ("Card", "you/kind", "refs/pr/1")]
