"""What of a run goes to the Hub, on a Hub that is only recorded."""

from pathlib import Path

import pytest
from huggingface_hub.utils import filter_repo_objects
from ppo.runs import EVERY_STEP, KEEP_ALL, Course, root_of
from safetensors.torch import load

from h2s import hub as hub_module

ADAPTER = {
    "adapter_config.json",
    "adapter_model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "h2s.json",
    "README.md",
}


@pytest.fixture
def hub(monkeypatch):
    """What was made and uploaded."""
    done = {"repos": [], "uploads": []}

    class Api:
        def __init__(self, token=None):
            self.token = token

        def create_repo(self, name, private, exist_ok):
            done["repos"].append((name, private, self.token))
            repo = name if "/" in name else f"me/{name}"
            return type("Url", (str,), {"repo_id": repo})(f"https://huggingface.co/{repo}")

        def create_branch(self, repo_id, branch, exist_ok):
            done["repos"].append((repo_id, branch))

        def upload_folder(self, repo_id, folder_path, allow_patterns, revision, commit_message):
            names = [str(f.relative_to(folder_path)) for f in Path(folder_path).rglob("*") if f.is_file()]
            kept = filter_repo_objects(names, allow_patterns=allow_patterns)
            files = {name: (Path(folder_path) / name).read_bytes() for name in kept}
            done["uploads"].append((repo_id, revision, commit_message, files))

    monkeypatch.setattr(hub_module, "HfApi", Api)
    return done


def test_a_run_pushes_the_kept_adapter_and_nothing_else(build, hub):
    """Once, at the end; the first of two steps was the better one."""
    trainer = build(Course([2.0, 1.0]), push_to_hub=True, hub_model_id="you/kind", **EVERY_STEP, **KEEP_ALL)
    trainer.train()
    ((repo, revision, message, files),) = hub["uploads"]
    assert (repo, revision, message) == ("you/kind", None, "End of training")
    assert hub["repos"] == [("you/kind", None, None)]
    assert files.keys() == ADAPTER
    root = root_of(trainer)
    best, last = (root / f"checkpoint-{n}" / "adapter_model.safetensors" for n in (1, 2))
    assert load(files["adapter_model.safetensors"])["prompt_embeddings"].equal(
        load(best.read_bytes())["prompt_embeddings"]
    )
    assert files["adapter_model.safetensors"] != last.read_bytes()
    assert files["README.md"].decode().count('.from_pretrained("you/kind")') == 2
    assert "secret" not in files["README.md"].decode()


def test_a_run_that_is_not_asked_to_pushes_nothing(build, hub):
    build(**KEEP_ALL).train()
    assert hub == {"repos": [], "uploads": []}


def test_a_trainer_pushes_when_told_to(build, hub):
    """With what was measured on the card, to a repository named after the run's folder unless it has a name."""
    trainer = build(folder="kind-run", hub_private_repo=True, hub_token="secret", hub_revision="second")
    trainer.train()
    assert hub["uploads"] == []
    url = trainer.push_to_hub("The second round", "It asks back more often.", dataset_name="as TRL's scripts say it")
    assert url == "https://huggingface.co/me/kind-run"
    assert hub["repos"] == [("kind-run", True, "secret"), ("me/kind-run", "second")]
    ((repo, revision, message, files),) = hub["uploads"]
    assert (repo, revision, message) == ("me/kind-run", "second", "The second round")
    assert files.keys() == ADAPTER and "It asks back more often." in files["README.md"].decode()
    assert not any(b"secret" in content for content in files.values())
    assert not any(b"secret" in f.read_bytes() for f in root_of(trainer).rglob("*") if f.is_file())


def test_the_kept_adapters_card_names_the_folder_that_it_lies_in(build):
    trainer = build(folder="kind-run", eval_strategy="steps", eval_steps=1)
    trainer.train()
    assert '.from_pretrained("kind-run")' in (root_of(trainer) / "README.md").read_text(encoding="utf-8")


def test_create_model_card_writes_the_card_alone(build):
    trainer = build()
    trainer.create_model_card(model_name="ignored", dataset_name="ignored")
    (card,) = root_of(trainer).iterdir()
    assert card.name == "README.md"
    assert card.read_text(encoding="utf-8").count('.from_pretrained("run")') == 2
