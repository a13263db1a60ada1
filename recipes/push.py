"""Push an adapter as it lies in its folder: a run's that did not reach the Hub, say, or the judge in it.

python recipes/push.py outputs/policy --hub_model_id user/kind
"""

from pathlib import Path

from h2s.hub import push_folders
from h2s.run.arguments import PushArguments
from h2s.run.folder import run_recipe
from h2s.run.recipe import parse_command


@run_recipe
def main(run, argv: list[str] | None = None) -> None:
    args, folder = parse_command(PushArguments, argv, folder="The adapter's folder.")
    name = args.hub_model_id or Path(folder).resolve().name
    for url in push_folders({Path(folder): name}, args):
        print(f"pushed to {url}")


if __name__ == "__main__":
    main()
