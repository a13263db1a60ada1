"""Everything once, on this project's sample data, with no account and no GPU: convert, reward, policy, compare.

    pip install -e ".[embedded]" && python recipes/quickstart.py

It shows that everything runs, and the first movement; `recipes/embedded/policy.yaml` as it stands is the run that
learns.
"""

import subprocess
import sys
import time
from pathlib import Path

from h2s.models import resolve_embedded
from h2s.run.folder import run_recipe

HERE = Path(__file__).parent
OUTPUTS = Path("outputs") / time.strftime("quickstart-%Y%m%d-%H%M%S")
# Few and short: a policy run of minutes, reported on few contexts.
FEW = ["--test_size", "0.1"]
SHORT = ["--max_steps", "6", "--per_device_train_batch_size", "12", *FEW]
REWARDS = ["--reward_adapter", "{out}/reward", "--judge_adapter", "{out}/reward/judge"]
STAGES = {
    "convert": ("convert_prompt.py", "the hard prompt as a soft prefix equal to it", []),
    "reward": ("train_reward.py", "a reward model and a judge learn the judgements", []),
    "policy": ("train_policy.py", "PPO moves the prefix", [*REWARDS, *SHORT]),
    "compare": (
        "compare.py",
        "soft against hard, and a blinded sheet",
        ["--policy_adapter", "{out}/policy", "--best_of_n", "4", *REWARDS, *FEW],
    ),
}


@run_recipe
def main(run, argv: list[str] | None = None) -> None:
    started = time.time()
    for name in ("embedded:gemma-3-270m", "embedded:minilm"):
        resolve_embedded(name)
    took = {"models": time.time() - started}
    for number, (stage, (script, what, flags)) in enumerate(STAGES.items(), start=1):
        print(f"\n=== {number} of {len(STAGES)}: {what} ({script}) ===", flush=True)
        before = time.time()
        config = HERE / "embedded" / f"{stage}.yaml"
        command = [sys.executable, str(HERE / script), "--config", str(config)]
        command += ["--output_dir", str(OUTPUTS), "--run_name", stage, *(f.format(out=OUTPUTS) for f in flags)]
        code = subprocess.run(command, check=False).returncode
        if code != 0:
            print(f"quickstart stopped: {script} ended with exit code {code}", file=sys.stderr)
            sys.exit(code)
        took[stage] = time.time() - before
    print(f"\n=== done in {(time.time() - started) / 60:.1f} minutes ===")
    for stage, seconds in took.items():
        print(f"{stage:>8}  {seconds:4.0f} s   {OUTPUTS / stage if stage in STAGES else 'ready'}")
    print(f"\nWhat came out, on contexts that nothing was trained on or chosen by: {OUTPUTS / 'compare' / 'README.md'}")
    print((OUTPUTS / "compare" / "README.md").read_text(encoding="utf-8").split("\n\n", 1)[1])
    print(f"For people to judge: {OUTPUTS / 'compare' / 'blinded.xlsx'}")
    print(f"Talk to it: python recipes/generate.py --policy_adapter {OUTPUTS / 'policy'}")


if __name__ == "__main__":
    main()
