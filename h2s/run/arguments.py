"""What a recipe's sections may hold: a dataclass a section and stage. (TRL's and transformers' own fill `task`.)"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from h2s.errors import InputError
from h2s.run.strengths import read_strengths

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

# TRL's ModelConfig has them under the same names.
QUANTIZATION = ("load_in_4bit", "bnb_4bit_quant_type", "use_bnb_nested_quant")
NO_DEVICE_MAP = (
    "it spreads one process's model over several cards, where a process here has one; "
    "accelerate_configs/multi_gpu.yaml is for a model that fits a card, fsdp2.yaml for one that does not"
)


def _setting(help_text: str, default: Any = None) -> Any:
    """A field with its help. Models and data have no default."""
    return field(default=default, metadata={"help": help_text})


def _mapping(name: str, value: Any) -> dict | None:
    """A setting that is a mapping; a flag's is JSON.

    Raises:
        InputError: it is none.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise InputError(f"{name} must be a mapping as JSON: {error}") from error
    if not isinstance(value, dict | None):
        raise InputError(f"{name} must be a mapping, got {value!r}")
    return value


@dataclass
class Section:
    """A section of a recipe."""

    def require(self, key: str, section: str) -> Any:
        """A setting without which nothing runs.

        Raises:
            InputError: it is missing.
        """
        value = getattr(self, key)
        if not value:
            raise InputError(f"{key} is missing: set it in section {section} of the recipe, or with --{key}")
        return value


@dataclass
class HardPromptArguments(Section):
    """The model and the prompt that a prefix is made from."""

    model_name_or_path: str | None = _setting("Chat model: a folder, a Hub name or embedded:gemma-3-270m.")
    model_revision: str | None = _setting("Revision of the model on the Hub.")
    dtype: Literal["auto", "bfloat16", "float32"] = _setting(
        "Of the frozen model; auto is bfloat16 on CUDA, float32 elsewhere.", "auto"
    )
    attn_implementation: str | None = _setting("Attention implementation, as transformers names them.")
    load_in_4bit: bool | None = _setting("Quantise the frozen model to 4 bits as it loads (bitsandbytes).")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] | None = _setting("Of these 4 bits; nf4 by default.")
    use_bnb_nested_quant: bool | None = _setting("Quantise their scales too.")
    hard_prompt: str | None = _setting("The system prompt itself.")
    hard_prompt_file: str | None = _setting("A UTF-8 text file that holds the system prompt.")
    opening_user_message: str | None = _setting("A user message before conversations that begin with the assistant.")
    chat_template_kwargs: dict | str | None = _setting("Settings of the model's chat template: a mapping, or JSON.")

    def __post_init__(self):
        self.chat_template_kwargs = _mapping("chat_template_kwargs", self.chat_template_kwargs)


@dataclass
class ConvertModelArguments(HardPromptArguments):
    """A model and a prompt; or, in the prompt's place, a checkpoint of hardPrompt2softPrompt."""

    legacy_checkpoint: str | None = _setting("A policy's .pth of hardPrompt2softPrompt; it brings its hard prompt.")


@dataclass
class TrainedPolicyArguments(HardPromptArguments):
    """A hard prompt, or a prefix adapter made before; and who judges what becomes of it."""

    prefix_adapter: str | None = _setting("A prefix adapter to go on from; the reference stays its hard prompt.")
    judge_adapter: str | None = _setting(
        "A reward adapter made from other conversations, not trained on: it reports, and of PPO selects."
    )


@dataclass
class PolicyModelArguments(TrainedPolicyArguments):
    """And the reward."""

    reward_adapter: list[str] | None | str = _setting(
        "A reward adapter made by train_reward.py; of several (a b) their mean, or the sum that reward_weights give."
    )
    reward_function: str | None = _setting(
        "In its place: a Python callable of TRL's signature, package.module.function."
    )

    def check_reward(self) -> None:
        """Check that one reward is named.

        Raises:
            InputError: both or none is.
        """
        if (self.reward_adapter is None) == (self.reward_function is None):
            given = "none" if self.reward_adapter is None else "both"
            raise InputError(f"expected one of reward_adapter and reward_function in section model, got {given}")


@dataclass
class RewardModelArguments(Section):
    """The encoder that learns the judgements."""

    reward_model_name_or_path: str | None = _setting(
        "A BERT, ELECTRA, RoBERTa or XLM-R: a folder, a Hub name or embedded:minilm."
    )
    num_virtual_tokens: int = _setting("Length of its soft prefix.", 20)
    max_tokens: int | None = _setting("Text tokens; positions minus virtual tokens.")


@dataclass
class AdapterArguments(Section):
    """A trained policy."""

    policy_adapter: str | None = _setting("A policy adapter made by one of the other recipes.")


@dataclass
class CompareModelArguments(AdapterArguments):
    """A trained policy, and a reward model to score it."""

    reward_adapter: list[str] | None | str = _setting(
        "A reward adapter that scores both sides; of several their mean; none: no scores."
    )
    judge_adapter: str | None = _setting("A second one, that the policy was not trained on.")


@dataclass
class QuestionArguments(Section):
    """What stands in front of contexts that begin with the assistant."""

    question_prefix: str | None = _setting(
        "Words in front of the assistant's opening question, for the model alone; none: those of the adapter, if any."
    )


@dataclass
class DatasetArguments(Section):
    """The data and how it is split."""

    path: list[str] | None | str = _setting("The file (xlsx, csv, json, jsonl, parquet) or Hub data set, or several.")
    test_size: float = _setting("Share of conversations reported on; half of it selects.", 0.2)
    split_seed: int = _setting("Seed of the split by conversation.", 42)

    def __post_init__(self):
        if isinstance(self.path, list) and len(self.path) == 1:  # a flag's
            self.path = self.path[0]


@dataclass
class JudgementDatasetArguments(DatasetArguments):
    """The judgements and how they are split."""

    sheet: str | None = _setting("The worksheet; the first visible one by default.")
    columns: dict | str | None = _setting("What the files call the columns: a mapping; as a flag JSON.")
    labels: dict | str | None = _setting('Which verdict means what: {"A": 0, "B": 1, "tie": 3}; as a flag JSON.')
    encoding: str | None = _setting("Of csv files; found by default.")

    def __post_init__(self):
        super().__post_init__()
        self.columns, self.labels = _mapping("columns", self.columns), _mapping("labels", self.labels)


@dataclass
class RewardDatasetArguments(JudgementDatasetArguments):
    """And what is measured on them."""

    folds: int | None = _setting("Cross-validate over this many folds by conversation first (5, say).")
    judge_share: float | None = _setting("Share of the conversations that a second model, the judge, gets (0.5, say).")


@dataclass
class DPODatasetArguments(QuestionArguments, JudgementDatasetArguments):
    """The judgements, how they are split, and what stands in front of their contexts."""


@dataclass
class PolicyDatasetArguments(QuestionArguments, DatasetArguments):
    """The contexts, how they are split, and what stands in front of them."""


@dataclass
class CompareDatasetArguments(PolicyDatasetArguments):
    """The contexts and which of them are compared; or a sheet that people have filled in."""

    split: Literal["test", "all"] = _setting("The held-out part, or all; of both what no model has seen.", "test")
    judged: list[str] | None | str = _setting(
        "Copies of a blinded sheet, filled in: report people's verdict, run nothing."
    )

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.judged, str):
            self.judged = [self.judged]

    def which_contexts(self) -> str:
        """What is compared, in words."""
        if self.split == "all":
            return "The contexts are all of the file."
        return f"The contexts are the test part by test_size {self.test_size} and split_seed {self.split_seed}."


@dataclass
class ConversationArguments:
    """What to reply to."""

    conversation: str | None = _setting("JSON or Python list of messages, or one user message; none: a chat.")


@dataclass
class RunArguments:
    """Where a run's files go."""

    output_dir: str = _setting("Folder that holds the runs' folders.", "outputs")
    run_name: str | None = _setting("The run's folder in it; a timestamp by default.")
    seed: int = _setting("Seed.", 42)


@dataclass
class PushArguments:
    """Where an adapter goes on the Hub."""

    hub_model_id: str | None = _setting("Repository on the Hub; the folder's name under your own by default.")
    hub_private_repo: bool | None = _setting("Whether a new repository is private.")
    hub_token: str | None = _setting("Token; that of `hf auth login` by default.")
    hub_revision: str | None = _setting("Branch to push to, made if it is new.")


@dataclass
class ConvertArguments(PushArguments, RunArguments):
    """Where the adapter goes."""

    push_to_hub: bool = _setting("Upload the adapter at the end.", False)


@dataclass
class GenerateArguments(RunArguments):
    """How replies are drawn."""

    max_completion_length: int = _setting("Most tokens of a reply.", 128)
    temperature: float = _setting("0 is greedy.", 0.7)
    top_k: int = _setting("0 keeps the whole vocabulary.", 0)
    top_p: float = _setting("Nucleus; 1 keeps the whole distribution.", 1.0)
    batch_size: int = _setting("Contexts at a time.", 16)

    def __post_init__(self):
        if self.max_completion_length < 1 or self.batch_size < 1:
            raise InputError("max_completion_length and batch_size must be at least 1")
        if not (self.temperature >= 0 and 0 < self.top_p <= 1 and self.top_k >= 0):  # NaN is neither
            raise InputError("expected temperature >= 0, 0 < top_p <= 1 and top_k >= 0")


@dataclass
class CompareArguments(GenerateArguments):
    """How replies are drawn, how many the hard prompt may choose from, how far the prefix goes, and the sheet."""

    best_of_n: int = _setting("Replies of the hard prompt to draw for the best-of-n yardstick; 0: none.", 8)
    strengths: list[float] | str | None = _setting(
        "Compare at these strengths too: hard + strength x (soft - hard), 0 to 1.5, such as 0.5,1,1.5."
    )
    language: Literal["en", "zh-TW"] = _setting("Of the blinded sheet: headings, choices, instructions.", "en")

    def __post_init__(self):
        super().__post_init__()
        if self.best_of_n != 0 and self.best_of_n < 2:
            raise InputError(f"best_of_n must be 0 or at least 2, got {self.best_of_n}")
        if self.strengths is not None:
            self.strengths = read_strengths(self.strengths)


def quantization_config(arguments: HardPromptArguments) -> "BitsAndBytesConfig | None":
    """What TRL makes of its `ModelConfig`'s settings of these names; None where nothing is quantised.

    Raises:
        InputError: one is given without `load_in_4bit`.
    """
    from trl import ModelConfig, get_quantization_config

    given = {name: value for name in QUANTIZATION if (value := getattr(arguments, name)) is not None}
    if not arguments.load_in_4bit and (idle := given.keys() - {"load_in_4bit"}):
        raise InputError(f"{' and '.join(sorted(idle))} would have no effect without load_in_4bit: true")
    return get_quantization_config(ModelConfig(**given))


def read_hard_prompt(arguments: HardPromptArguments) -> str:
    """The hard prompt, from exactly one of `hard_prompt` and `hard_prompt_file`.

    Raises:
        InputError: both or none is given, the file cannot be read, or the prompt is empty.
    """
    if (arguments.hard_prompt is None) == (arguments.hard_prompt_file is None):
        given = "none" if arguments.hard_prompt is None else "both"
        raise InputError(f"expected one of hard_prompt and hard_prompt_file, got {given}")
    prompt = arguments.hard_prompt
    if prompt is None:
        try:
            prompt = Path(str(arguments.hard_prompt_file)).read_text(encoding="utf-8-sig").strip()
        except (OSError, ValueError) as error:
            raise InputError(f"hard_prompt_file cannot be read: {error}") from error
    if not prompt.strip():
        raise InputError("the hard prompt is empty")
    return prompt
