"""A push that fails costs nothing, and what would fail is refused before a run begins; over HTTP (`hub_server.py`)."""

import json
import shlex
import shutil
import socket

import pytest
from huggingface_hub import ModelCard, constants
from tiny import HARD_PROMPT

from h2s import InputError, PrefixTuningPolicyModel, RewardModel
from h2s.errors import PushError
from h2s.hub import check_push, push_folder
from h2s.run.arguments import PushArguments

# A push that fails


def says_the_command(line: str) -> list[str]:
    """The pushes that a failure's line names, as arguments of `recipes/push.py`."""
    commands = [shlex.split(command) for command in line.split("all is saved, and this pushes it: ")[1].split(" && ")]
    assert all(command[:2] == ["python", "recipes/push.py"] for command in commands)
    return [command[2:] for command in commands]


def break_hub(hub, monkeypatch, how):
    """In each way from here on, but for what is asked before a run begins."""
    if how == "no network":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
    else:
        step, status = how.split()
        hub.failing[step] = int(status)


@pytest.fixture
def fails(recipes, capfd):
    """Run a recipe whose push fails: everything before it is done. Returns the line that says so."""

    def run(name, *argv):
        with pytest.raises(SystemExit) as stop:
            recipes[name].main([str(a) for a in argv])
        err = capfd.readouterr().err
        assert stop.value.code == 1
        line = err.splitlines()[-1]
        assert line.startswith("error: not pushed to ") and "hf_of_me" not in err
        return line

    return run


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("no network", "Connection refused"),
        ("create 401", "401"),
        ("create 403", "403 Forbidden"),
        ("commit 500", "500 Internal Server Error"),
    ],
)
def test_a_push_that_fails_costs_nothing(how, said, published, hub, fails, recipes, tmp_path, monkeypatch, capfd):
    """It ends in a command, and that command pushes what the run had made, as it would have been pushed."""
    endpoint, folder = constants.ENDPOINT, tmp_path / "out puts" / "kind"
    break_hub(hub, monkeypatch, how)
    line = fails(
        "convert_prompt", "--model_name_or_path", published["makers/tiny-gemma"], "--hard_prompt", HARD_PROMPT,
        "--output_dir", folder.parent, "--run_name", "kind", "--push_to_hub", "true", "--hub_model_id", "me/kind",
        "--hub_private_repo", "true", "--hub_revision", "second"
    )  # fmt: skip
    assert said in line and line in (folder / "train.log").read_text(encoding="utf-8")
    PrefixTuningPolicyModel.from_pretrained(folder)
    (argv,) = says_the_command(line)
    assert argv == [
        str(folder), "--hub_model_id", "me/kind", "--hub_private_repo", "true", "--hub_revision", "second"
    ]  # fmt: skip
    assert says_the_command(fails("push", *argv)) == [argv]
    hub.failing.clear()
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    recipes["push"].main(argv)
    assert capfd.readouterr().out.splitlines()[-1] == f"pushed to {hub.url}/me/kind"
    repository = hub.repositories["me/kind"]
    assert repository.private and repository.files().keys() == {".gitattributes"}
    pushed = repository.files("second")
    assert pushed["adapter_model.safetensors"] == (folder / "adapter_model.safetensors").read_bytes()
    card = pushed["README.md"].decode()
    assert card.count('.from_pretrained("me/kind", revision="second")') == card.count(".from_pretrained(") == 2
    assert "Largest logit difference" in card
    assert '.from_pretrained("kind")' in (folder / "README.md").read_text(encoding="utf-8")


def test_a_push_of_two_that_fails_names_both(published, hub, fails, sheet_file, tmp_path):
    """Of a reward and its judge; both were trained first."""
    hub.failing["create"] = 403
    line = fails(
        "train_reward", "--reward_model_name_or_path", published["makers/tiny-bert"], "--num_virtual_tokens", "4",
        "--path", sheet_file, "--judge_share", "0.5", "--test_size", "0.4", "--max_steps", "1", "--report_to", "none",
        "--output_dir", tmp_path, "--run_name", "likes", "--push_to_hub", "true"
    )  # fmt: skip
    assert says_the_command(line) == [
        [str(tmp_path / "likes"), "--hub_model_id", "likes"],
        [str(tmp_path / "likes" / "judge"), "--hub_model_id", "likes-judge"],
    ]
    for folder in ("likes", "likes/judge"):
        RewardModel.from_pretrained(tmp_path / folder)


def test_from_python_it_raises(published, hub):
    adapter = PrefixTuningPolicyModel.from_hard_prompt(str(published["makers/tiny-gemma"]), HARD_PROMPT)
    hub.failing["commit"] = 500
    with pytest.raises(PushError, match=r"^not pushed to me/kind: Server error '500 .*Internal Error") as failed:
        adapter.push_to_hub("me/kind")
    assert failed.value.__cause__.response.status_code == 500


# What is checked before a run begins


def asks(**settings) -> PushArguments:
    return PushArguments(**{"hub_model_id": "me/kind", **settings})


@pytest.mark.parametrize("name", ["a/b/c", "me/ki nd", "-kind", "me/a--b", "you/" + "k" * 100])
def test_a_repository_that_cannot_be(hub, name, tmp_path):
    with pytest.raises(InputError, match=f"hub_model_id cannot be {name}: "):
        check_push(asks(hub_model_id=name), "makers/tiny-gemma", None)
    with pytest.raises(InputError, match=f"hub_model_id cannot be {name}: "):  # a run's name in its place
        check_push(asks(hub_model_id=None), "makers/tiny-gemma", name)


def test_the_judges_repository_too(hub):
    check_push(asks(hub_model_id="k" * 90), "makers/tiny-gemma", None)
    with pytest.raises(InputError, match=r"hub_model_id cannot be k+-judge: "):
        check_push(asks(hub_model_id="k" * 91), "makers/tiny-gemma", None, ["", "-judge"])


def test_the_token(hub, monkeypatch, caplog):
    check_push(asks(), "makers/tiny-gemma", None)
    check_push(asks(hub_token="hf_of_you"), "makers/tiny-gemma", None)
    with pytest.raises(InputError, match=r"the token for the push is not valid: .*Invalid user token"):
        check_push(asks(hub_token="hf_of_nobody"), "makers/tiny-gemma", None)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(InputError, match="a push needs a token: `hf auth login`, HF_TOKEN in the environment, or"):
        check_push(asks(), "makers/tiny-gemma", None)
    assert not caplog.records


def test_a_hub_that_cannot_be_reached_yet_is_told_and_no_more(hub, monkeypatch, caplog):
    break_hub(hub, monkeypatch, "no network")
    check_push(asks(), "makers/tiny-gemma", None)
    assert "the Hub cannot be asked now whether the token is valid: " in caplog.text and "hf_of_me" not in caplog.text


def test_a_local_base_is_refused_before_anything_loads(refused, hub):
    for name in ("convert_prompt", "train_reward", "train_policy", "train_dpo"):
        line = refused(name, task={"push_to_hub": True, "hub_model_id": "me/kind"})
        assert "the base model is a folder of this machine, " in line and "give the base by its name on the Hub" in line
    assert not [request for request in hub.requests if "whoami" not in request]


# recipes/push.py


def test_push_of_what_is_none(recipes, reward_adapter, hub, tmp_path, capfd):
    (tmp_path / "empty").mkdir()
    cut = tmp_path / "cut"
    shutil.copytree(reward_adapter, cut)
    (cut / "adapter_model.safetensors").write_bytes((cut / "adapter_model.safetensors").read_bytes()[:-1])
    for argv, said in [
        ([], "the following arguments are required: folder"),
        ([tmp_path / "nowhere"], "nowhere is not an adapter made by h2s: there is no adapter_config.json in it"),
        ([tmp_path / "empty"], "empty is not an adapter made by h2s: there is no adapter_config.json in it"),
        ([cut], "adapter_model.safetensors is not a whole safetensors file"),
        ([reward_adapter], "the base model is a folder of this machine"),
        ([reward_adapter, "--hub_model_id", "a b"], "hub_model_id cannot be a b"),
        ([reward_adapter, "--hub_modelid", "a/b"], "unknown flag --hub_modelid; did you mean --hub_model_id?"),
    ]:
        with pytest.raises(SystemExit) as stop:
            recipes["push"].main([str(a) for a in argv])
        (line,) = capfd.readouterr().err.splitlines()
        assert stop.value.code == 2 and line.startswith("error: ") and said in line
    for name, content in [
        ("adapter_config.json", "[1]"),
        ("adapter_config.json", "{"),
        ("README.md", "---\na: [\n---\n"),
    ]:
        broken = shutil.copytree(reward_adapter, tmp_path / "broken", dirs_exist_ok=True)
        (broken / name).write_text(content, encoding="utf-8")
        with pytest.raises(InputError, match="broken is not an adapter made by h2s: "):
            push_folder(broken, "me/kind")
    assert not [request for request in hub.requests if request.startswith("POST")]


def test_a_base_that_is_named_afterwards_is_named_everywhere(reward_adapter, bert_folder, hub, tmp_path):
    """As the refusal says to do; the folder stays as it is otherwise."""
    folder = shutil.copytree(reward_adapter, tmp_path / "likes")
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == str(bert_folder)
    config["base_model_name_or_path"] = "makers/tiny-bert"
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    push_folder(folder, "me/likes")
    files = hub.repositories["me/likes"].files()
    assert json.loads(files["adapter_config.json"]) == config
    card, before = ModelCard(files["README.md"].decode()), ModelCard.load(folder / "README.md")
    assert before.data.base_model is None and card.data.base_model == "makers/tiny-bert"
    expected = before.text.replace(f"Base model: {bert_folder.name}", "Base model: makers/tiny-bert")
    assert card.text == expected.replace('from_pretrained("reward"', 'from_pretrained("me/likes"')
