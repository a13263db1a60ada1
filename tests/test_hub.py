"""Adapters in folders, and the card: what it says, and that what it says to run runs. (`test_hub_http.py`: the Hub.)"""

import json
import re
import shutil

import pytest
from elsewhere import elsewhere
from huggingface_hub import ModelCard
from tiny import HARD_PROMPT, build_reward_model
from transformers import pipeline

from h2s import InputError, PrefixTuningPolicyModel
from h2s import hub as hub_module
from h2s.hub import adapter_folder, hub_name, write_card


@pytest.fixture(params=["policy", "reward"])
def adapter(request, gemma_folder, bert_folder):
    if request.param == "reward":
        return build_reward_model(bert_folder)
    return PrefixTuningPolicyModel.from_hard_prompt(str(gemma_folder), HARD_PROMPT)


# Download


@pytest.mark.parametrize("name", ["no-such-folder", "./outputs/none", "a/b/c", "/nowhere/b", "~/adapter"])
def test_adapter_folder_that_is_none(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"no such adapter folder: {name}"):
        adapter_folder(name)


def test_an_adapter_on_the_hub_is_downloaded_without_programs_or_pickles(monkeypatch, tmp_path):
    asked = []

    def snapshot_download(*args, allow_patterns, **kwargs):
        asked.append((*args, kwargs))
        assert set(allow_patterns) == {"*.json", "*.safetensors", "*.txt", "*.jinja"}
        return str(tmp_path)

    monkeypatch.setattr(hub_module, "snapshot_download", snapshot_download)
    assert adapter_folder("you/kind", "second", token="secret", cache_dir="here") == str(tmp_path)
    assert asked == [("you/kind", {"revision": "second", "token": "secret", "cache_dir": "here"})]


def test_links_of_the_hubs_own_cache_and_links_that_lead_out(tmp_path):
    """The cache keeps files beside its snapshots; elsewhere a link could name any file of this machine."""
    for there in ("models--me--kind/snapshots/abc", "models--me--kind/blobs", "copied"):
        (tmp_path / there).mkdir(parents=True)
    blob = tmp_path / "models--me--kind" / "blobs" / "123"
    blob.write_text("{}", encoding="utf-8")
    snapshot = tmp_path / "models--me--kind" / "snapshots" / "abc"
    for folder in (snapshot, tmp_path / "copied"):
        (folder / "adapter_config.json").symlink_to(blob)
    assert adapter_folder(snapshot) == str(snapshot)
    with pytest.raises(InputError, match=f"is a link out of its folder, to {blob}: put the file itself there"):
        adapter_folder(tmp_path / "copied")
    (snapshot / "h2s.json").symlink_to(tmp_path / "copied" / "secret.json")
    with pytest.raises(InputError, match="is a link out of its folder"):
        adapter_folder(snapshot)


@pytest.mark.parametrize("error", [OSError("offline\nnow"), ValueError("bad name")])
def test_an_adapter_that_the_hub_does_not_give(error, monkeypatch):
    def snapshot_download(*args, **kwargs):
        raise error

    monkeypatch.setattr(hub_module, "snapshot_download", snapshot_download)
    with pytest.raises(
        InputError, match=r"you/kind is no folder, and the Hub gives no such adapter: (offline now|bad)"
    ):
        adapter_folder("you/kind")


# The base model's name


@pytest.mark.parametrize(
    ("base", "known"),
    [
        ("google/gemma-3-1b-it", ("google/gemma-3-1b-it", None)),
        ("gpt2", ("gpt2", None)),
        ("models--google--gemma-3-1b-it/snapshots/abc", ("google/gemma-3-1b-it", "abc")),
        ("models--gpt2/snapshots/abc", ("gpt2", "abc")),
        ("datasets--google--x/snapshots/abc", None),
        ("gemma/snapshots/abc", None),
        ("models--google--gemma", None),
        ("google/gemma", None),
    ],
)
def test_the_name_by_which_anybody_loads_a_base(base, known, tmp_path, monkeypatch):
    """A folder's is known in the Hub's cache alone, and a folder of that name comes first, as it does when it loads."""
    monkeypatch.chdir(tmp_path)
    if base not in ("google/gemma-3-1b-it", "gpt2"):
        (tmp_path / base).mkdir(parents=True)
        # What this one was made from, say.
        (tmp_path / base / "config.json").write_text('{"_name_or_path": "google/gemma-3-1b-it"}', encoding="utf-8")
        assert hub_name(str(tmp_path / base)) == known
    assert hub_name(base) == known


@pytest.mark.parametrize("base", ["/home/alice/gemma", "../gemma", "C:\\models\\gemma", "a/b/c"])
def test_a_folder_that_is_gone_is_no_name(base):
    assert hub_name(base) is None


# The card


@pytest.mark.parametrize("base", ["google/gemma-3-1b-it", "folder"])
def test_what_the_card_says(base, tmp_path):
    """The verdict first. A base on the Hub is linked; of a folder only the last part is told."""
    local = tmp_path / "secret-project" / "my-gemma"
    local.mkdir(parents=True)
    of, report = str(local) if base == "folder" else base, "Gained.\nBut.\n\nMeasured.\n\nMore."
    write_card(tmp_path, "A prefix", of, "What it is.", report, "use()", "text-generation", ["x"])
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("peft", "text-generation")
    assert card.data.tags == ["h2s", "prefix-tuning", "x"]
    assert card.data.base_model == (None if base == "folder" else base)
    base = f"Base model: {'my-gemma' if base == 'folder' else base}"
    assert f"# A prefix\n\nGained.\nBut.\n\n{base}\n\nWhat it is.\n\nMeasured.\n\nMore.\n\n## Use" in card.text
    write_card(tmp_path, "A prefix", of, "What it is.", "", "use()", "text-generation", ["x"])
    assert f"# A prefix\n\n{base}\n\nWhat it is.\n\n## Use" in ModelCard.load(tmp_path / "README.md").text
    assert "```python\nuse()\n```" in card.text and "secret-project" not in card.content
    assert re.search(r"torch \d.*, transformers \d.*, peft \d.*, trl \d.*, datasets \d", card.text)


def test_a_card_written_again_says_the_new(adapter, tmp_path):
    """As after training, when the adapter lies there already."""
    adapter.save_pretrained(tmp_path / "run", "First.")
    adapter.write_card(tmp_path / "run", "Second.")
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert "Second." in card and "First." not in card
    assert card.count('.from_pretrained("run"') == card.count(".from_pretrained(") == 2


# Runs a card's example where there is no h2s, and says what its last line gives.
RUN = """
import ast

*lines, last = ast.parse(given).body
names = {}
exec(compile(ast.Module(lines, []), "card", "exec"), names)
value = eval(compile(ast.Expression(last.value), "card", "eval"), names)
found = value if isinstance(value, list) else value.tolist()
"""


def run_example(folder):
    (example,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    return elsewhere(RUN, example, folder.parent)


@pytest.mark.parametrize(
    ("opening", "own"),
    [((), {}), (("start",), {"use_cache": False})],
    ids=["user first", "assistant first, what PEFT cannot generate with"],
)
def test_the_example_of_a_policy_answers_as_the_hard_prompt(gemma_folder, opening, own, tmp_path):
    base = shutil.copytree(gemma_folder, tmp_path / "base")
    settings = json.loads((base / "generation_config.json").read_text(encoding="utf-8"))
    for name in ("top_k", "top_p"):
        del settings[name]
    settings |= {"do_sample": False, "max_new_tokens": 8, **own}
    (base / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    policy = PrefixTuningPolicyModel.from_hard_prompt(str(base), HARD_PROMPT, *opening)
    policy.save_pretrained(tmp_path / "kind")
    (answered,) = run_example(tmp_path / "kind")
    *messages, reply = answered["generated_text"]
    front = [{"role": "system", "content": HARD_PROMPT}, *({"role": "user", "content": o} for o in opening)]
    expected = pipeline("text-generation", model=str(base))([*front, *messages])[0]["generated_text"][-1]
    assert reply == expected and len(policy.tokenizer(reply["content"]).input_ids) > 4
    assert messages[0]["role"] == ("assistant" if opening else "user")


def test_the_example_of_a_reward_scores_as_the_reward(loud_bert, tmp_path):
    """Of an encoder that has no label of its own, as most have none: transformers would give it two."""
    base = shutil.copytree(loud_bert, tmp_path / "base")
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    labels = {name: config.pop(name) for name in ("id2label", "label2id")}
    assert labels["id2label"].keys() == {"0"}
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    reward = build_reward_model(base)
    reward.save_pretrained(tmp_path / "judge")
    ((score,),) = run_example(tmp_path / "judge")
    assert score == pytest.approx(reward.score(["the context"], ["the response"]).item(), abs=1e-5)
    assert score != pytest.approx(reward.score(["the response"], ["the context"]).item(), abs=1e-3)
