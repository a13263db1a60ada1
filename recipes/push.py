"""Push an adapter as it lies in its folder: a run's that did not reach the Hub, say, or the judge in it.

python recipes/push.py outputs/policy --hub_model_id user/kind
"""

from pathlib import Path

from h2s.run.arguments import PushArguments
from h2s.run.folder import run_recipe
from h2s.run.recipe import parse_command


@run_recipe
def main(run, argv: list[str] | None = None) -> None:
    args, folder = parse_command(PushArguments, argv, folder="The adapter's folder.")
    # Here, not above: it takes seconds to import, and what is wrong with the flags has been told by now.
    from h2s.hub import push_folders

    path = Path(folder).expanduser()
    for url in push_folders({path: args.hub_model_id or path.resolve().name}, args):
        print(f"pushed to {url}")


if __name__ == "__main__":
    main()
