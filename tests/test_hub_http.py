"""Pushes and downloads by the Hub's own protocol, over HTTP, to a server that speaks it (`hub_server.py`).

What somebody else does with what was pushed is done in a process that has no h2s. The real Hub's validation of a card's
metadata (`/api/validate-yaml`) has no counterpart here: its fields are checked one by one.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id
from tiny import HARD_PROMPT, ROOT, build_reward_model
from transformers.pipelines import SUPPORTED_TASKS

from h2s import InputError, PrefixTuningPolicyModel
from h2s.hub import adapter_folder
from h2s.models import load_base_model, load_tokenizer

FILES = {
    "adapter_config.json",
    "adapter_model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "h2s.json",
    "README.md",
}
BASES = {"policy": "makers/tiny-gemma", "reward": "makers/tiny-bert"}


@pytest.fixture(params=["policy", "reward"])
def kind(request):
    return request.param


@pytest.fixture
def adapter(kind, published):
    folder = published[BASES[kind]]
    if kind == "reward":
        return build_reward_model(folder)
    return PrefixTuningPolicyModel.from_hard_prompt(str(folder), HARD_PROMPT)


def environment_of(hub, home: Path, **more: str) -> dict[str, str]:
    """Of a process on another machine: it reaches the Hub, and has none of this one's caches."""
    return {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", **more}


def pushed_card(hub, name, revision="main"):
    return hub.repositories[name].files(revision)["README.md"].decode()


# What is pushed


@pytest.mark.parametrize(("name", "repo"), [("me/kind", "me/kind"), ("kind", "me/kind")])
def test_push_is_one_commit_of_the_adapter_and_nothing_else(
    adapter, kind, hub, published, name, repo, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    files = FILES | ({"chat_template.jinja"} if kind == "policy" else set())
    url = adapter.push_to_hub(name, "Measured: much.", private=True, token="hf_of_me", commit_message="First")
    assert url == f"{hub.url}/{repo}"
    repository = hub.repositories[repo]
    assert list(repository.titles.values()) == ["initial commit", "First"] and repository.private
    pushed = repository.files()
    assert pushed.keys() - {".gitattributes"} == files
    for content in pushed.values():
        assert not any(secret in content for secret in (b"hf_of_me", str(published[BASES[kind]].parents[3]).encode()))
    config = json.loads(pushed["adapter_config.json"])
    assert config["base_model_name_or_path"] == BASES[kind] and config["revision"] == published[BASES[kind]].name
    card = pushed["README.md"].decode()
    assert card.count(f'.from_pretrained("{repo}"') == card.count(".from_pretrained(") == 2
    assert "revision=" not in card and "Measured: much." in card
    assert not list(tmp_path.iterdir())


def test_the_cards_metadata(adapter, kind, hub):
    adapter.push_to_hub("me/kind")
    data = ModelCard(pushed_card(hub, "me/kind")).data
    validate_repo_id(data.base_model)
    assert (data.base_model, data.base_model_relation, data.library_name) == (BASES[kind], "adapter", "peft")
    assert data.pipeline_tag in SUPPORTED_TASKS
    assert data.tags == ["h2s", "prefix-tuning", *(["reward-model"] if kind == "reward" else [])]
    assert data.license is data.model_name is data.eval_results is None
    assert "POST /api/validate-yaml" in hub.requests  # which huggingface_hub asks before it uploads


def test_a_branch_is_made_where_it_is_new_and_a_pull_request_is_none(adapter, hub):
    adapter.push_to_hub("me/kind", commit_message="First")
    repository = hub.repositories["me/kind"]
    repository.refs["refs/pr/1"] = first = repository.refs["main"]
    for revision in ("second", "second", "refs/pr/1"):
        adapter.push_to_hub("me/kind", "Better.", revision=revision)
        card = pushed_card(hub, "me/kind", revision)
        assert card.count(f'.from_pretrained("me/kind", revision="{revision}"') == card.count(".from_pretrained(") == 2
    assert repository.refs.keys() == {"main", "second", "refs/pr/1"} and repository.refs["main"] == first
    assert sum(request.startswith("POST /api/models/me/kind/branch/second") for request in hub.requests) == 2


def test_a_base_that_only_this_machine_has_is_not_pushed(gemma_folder, bert_folder, hub):
    policy = PrefixTuningPolicyModel.from_hard_prompt(str(gemma_folder), HARD_PROMPT)
    for adapter, base in ((policy, gemma_folder), (build_reward_model(bert_folder), bert_folder)):
        with pytest.raises(InputError, match=f"base model is a folder of this machine, {base}, and nobody else could"):
            adapter.push_to_hub("me/kind")
    assert "me/kind" not in hub.repositories


# What somebody else does with it

ELSEWHERE = """
import json, sys
sys.modules["h2s"] = None
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer

of = {"revision": "second", "token": "hf_of_you"}
model = AutoPeftModelForCausalLM.from_pretrained("you/kind", **of)
tokenizer = AutoTokenizer.from_pretrained("you/kind", **of)
chat = [{"role": "user", "content": "hello"}]
ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt").input_ids
logits = model(ids).logits[0, -1].tolist()
reward = AutoPeftModelForSequenceClassification.from_pretrained("you/likes", num_labels=1, **of)
tokenizer = AutoTokenizer.from_pretrained("you/likes", **of)
score = reward(**tokenizer("the context", "the response", return_tensors="pt")).logits.item()
try:
    AutoTokenizer.from_pretrained("you/kind", revision="second")
    seen = True
except OSError:
    seen = False
print(json.dumps([logits, score, seen]))
"""


@torch.no_grad()
def test_plain_peft_loads_it_by_name_with_revision_and_token(published, hub, tmp_path):
    """On another machine, where there is no h2s; both repositories are private, and the base is public."""
    gemma = published["makers/tiny-gemma"]
    policy = PrefixTuningPolicyModel.from_hard_prompt(str(gemma), HARD_PROMPT)
    reward = build_reward_model(published["makers/tiny-bert"])
    for adapter, name in ((policy, "you/kind"), (reward, "you/likes")):
        adapter.push_to_hub(name, private=True, token="hf_of_you", revision="second")
    environment = environment_of(hub, tmp_path / "other-cache", HF_TOKEN="hf_of_me")
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    logits, score, seen_without_its_token = json.loads(done.stdout)
    chat = [{"role": "system", "content": HARD_PROMPT}, {"role": "user", "content": "hello"}]
    ids = load_tokenizer(str(gemma)).apply_chat_template(
        chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    expected = load_base_model(str(gemma), dtype="float32")(ids.input_ids).logits[0, -1]
    assert (torch.tensor(logits) - expected).abs().max() < 1e-4 < expected.std()
    assert score == pytest.approx(reward.score(["the context"], ["the response"]).item(), abs=1e-5)
    assert not seen_without_its_token


def test_a_name_with_a_revision(published, hub, tmp_path, monkeypatch):
    policy = PrefixTuningPolicyModel.from_hard_prompt(str(published["makers/tiny-gemma"]), HARD_PROMPT)
    policy.push_to_hub("me/kind", "The first.", private=True)
    policy.push_to_hub("me/kind", "The second.", revision="second")
    cache = {"cache_dir": tmp_path / "cache"}
    commits = hub.repositories["me/kind"].refs
    for asked, revision in [
        (("me/kind",), "main"),
        (("me/kind@second",), "second"),
        (("me/kind", "second"), "second"),
        (("me/kind@second", "second"), "second"),
        ((f"me/kind@{commits['main']}",), "main"),
    ]:
        assert Path(adapter_folder(*asked, **cache)).name == commits[revision]
    with pytest.raises(InputError, match="me/kind@second names a revision, and revision is main: give one of the two"):
        adapter_folder("me/kind@second", "main", **cache)
    with pytest.raises(InputError, match=r"me/kind@third is no folder, and the Hub gives no such adapter: .*third"):
        adapter_folder("me/kind@third", **cache)
    with pytest.raises(InputError, match=r"the Hub gives no such adapter: 404 Client Error"):
        adapter_folder("me/kind", token="hf_of_you", cache_dir=tmp_path / "yours")
    monkeypatch.chdir(tmp_path)
    Path("me/kind@second").mkdir(parents=True)
    assert adapter_folder("me/kind@second") == str(tmp_path / "me" / "kind@second")


# The recipes

COMMANDS = """
import runpy, sys
for line in sys.stdin.read().splitlines():
    sys.argv = line.split("\\t")
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        sys.exit(end.code)
"""


def test_every_recipe_pushes_and_takes_what_was_pushed(hub, sheet_file, contexts_file, tmp_path):
    """By their command lines, on models and adapters that are known by their names on the Hub alone."""
    small = ["--report_to", "none", "--max_steps", "1"]
    push = ["--push_to_hub", "true", "--hub_private_repo", "true", "--hub_model_id"]
    sheet = ["--path", sheet_file, "--test_size", "0.4"]
    contexts = ["--path", contexts_file, "--test_size", "0.4", "--max_completion_length", "4"]
    commands = [
        ["convert_prompt", "--model_name_or_path", "makers/tiny-gemma", "--hard_prompt", HARD_PROMPT,
         "--run_name", "kind", "--hub_revision", "second", *push, "me/kind"],
        ["train_reward", "--reward_model_name_or_path", "makers/tiny-bert", "--num_virtual_tokens", "4", *sheet, *small,
         "--judge_share", "0.5", "--run_name", "likes", *push, "me/likes"],
        ["train_policy", "--prefix_adapter", "me/kind@second", "--reward_adapter", "me/likes@main",
         "--judge_adapter", "me/likes-judge", *contexts, *small, "--run_name", "kinder", *push, "kinder"],
        ["train_dpo", "--prefix_adapter", "me/kind@second", "--judge_adapter", "me/likes-judge", *sheet, *small,
         "--max_completion_length", "4", "--run_name", "kindest", *push, "kindest"],
        ["generate", "--policy_adapter", "me/kinder@main", "--conversation", "hello", "--max_completion_length", "4"],
        ["push", "outputs/likes/judge", "--hub_model_id", "me/other"],
    ]  # fmt: skip
    lines = "\n".join("\t".join([str(ROOT / "recipes" / f"{name}.py"), *map(str, rest)]) for name, *rest in commands)
    environment = environment_of(hub, tmp_path / "home", PYTHONPATH=str(ROOT))
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS],
        input=lines,
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    outputs = tmp_path / "outputs"
    pushed = {
        "kind": (outputs / "kind", "Largest logit difference"),
        "likes": (outputs / "likes", "This is the reward model of its run"),
        "likes-judge": (outputs / "likes" / "judge", "This is the judge model of its run"),
        "kinder": (outputs / "kinder", "soft minus hard"),
        "kindest": (outputs / "kindest", "Better than 'the longer wins'"),
        "other": (outputs / "likes" / "judge", "This is the judge model of its run"),
    }
    for name, (folder, said) in pushed.items():
        repository = hub.repositories[f"me/{name}"]
        files = repository.files("second" if name == "kind" else "main")
        assert files.keys() - {".gitattributes", "chat_template.jinja"} == FILES, name
        assert files["adapter_model.safetensors"] == (folder / "adapter_model.safetensors").read_bytes(), name
        assert f"pushed to {hub.url}/me/{name}\n" in done.stdout and repository.private == (name != "other")
        for content in files.values():
            assert not any(secret in content for secret in (b"hf_of_me", str(tmp_path).encode())), name
        card = files["README.md"].decode()
        assert said in card and card.count(f'.from_pretrained("me/{name}"') == card.count(".from_pretrained(") == 2
