"""What of a run goes to the Hub, over HTTP."""

import pytest
from ppo.runs import EVERY_STEP, KEEP_ALL, Course, prefix_of, root_of, saved_prefix
from safetensors.torch import load
from tiny import HARD_PROMPT

from h2s import InputError, PrefixTuningPolicyModel
from h2s.errors import PushError

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
def of_hub(published):
    """A fresh policy whose base has a name on the Hub."""
    return PrefixTuningPolicyModel.from_hard_prompt(str(published["makers/tiny-gemma"]), HARD_PROMPT, dtype="float32")


def pushed(hub):
    return {name: r for name, r in hub.repositories.items() if not name.startswith("makers/")}


def test_a_run_pushes_the_kept_adapter_and_nothing_else(build, of_hub, hub):
    """Once, at the end; the first of two steps was the better one."""
    trainer = build(
        Course([2.0, 1.0]), model=of_hub, push_to_hub=True, hub_model_id="me/kind", **EVERY_STEP, **KEEP_ALL
    )
    trainer.train()
    ((repo, repository),) = pushed(hub).items()
    assert repo == "me/kind" and list(repository.titles.values()) == ["initial commit", "End of training"]
    files = repository.files()
    assert files.keys() - {".gitattributes"} == ADAPTER
    root = root_of(trainer)
    best, last = (root / f"checkpoint-{n}" / "adapter_model.safetensors" for n in (1, 2))
    assert load(files["adapter_model.safetensors"])["prompt_embeddings"].equal(
        load(best.read_bytes())["prompt_embeddings"]
    )
    assert files["adapter_model.safetensors"] != last.read_bytes()
    assert files["README.md"].decode().count('.from_pretrained("me/kind")') == 2


def test_a_run_that_is_not_asked_to_pushes_nothing(build, of_hub, hub):
    build(model=of_hub, **KEEP_ALL).train()
    assert hub.requests == []


def test_a_trainer_pushes_when_told_to(build, of_hub, hub):
    """With what was measured on the card, to a repository named after the run's folder unless it has a name."""
    trainer = build(
        folder="kind-run", model=of_hub, hub_private_repo=True, hub_token="hf_of_you", hub_revision="second"
    )
    trainer.train()
    assert hub.requests == []
    url = trainer.push_to_hub("The second round", "It asks back more often.", dataset_name="as TRL's scripts say it")
    assert url == f"{hub.url}/you/kind-run"
    ((repo, repository),) = pushed(hub).items()
    assert repo == "you/kind-run" and repository.private and list(repository.titles.values())[1] == "The second round"
    files = repository.files("second")
    assert files.keys() - {".gitattributes"} == ADAPTER
    assert "It asks back more often." in files["README.md"].decode()
    assert not any(b"hf_of_you" in content for content in files.values())
    assert not any(b"hf_of_you" in f.read_bytes() for f in root_of(trainer).rglob("*") if f.is_file())


def test_what_cannot_be_pushed_is_refused_before_the_first_step(build, hub):
    trainer = build(push_to_hub=True)
    with pytest.raises(InputError, match="the base model is a folder of this machine"):
        trainer.train()
    assert trainer.state.global_step == 0 and not pushed(hub)


def test_a_push_that_fails_at_the_end_leaves_the_adapter(build, of_hub, hub):
    hub.failing["commit"] = 500
    trainer = build(model=of_hub, push_to_hub=True, hub_model_id="me/kind")
    with pytest.raises(PushError, match=r"this pushes it: python recipes/push.py \S+run --hub_model_id me/kind$"):
        trainer.train()
    assert {f.name for f in root_of(trainer).iterdir()} >= ADAPTER
    assert saved_prefix(root_of(trainer)).equal(prefix_of(trainer))


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
