"""The programs `safemerge`, with a verb a file or group, and `safemerge-run`, which is its verb `run`.

A verb reads options, calls `api` and prints. Nothing heavy is imported before a verb needs it.
"""

from __future__ import annotations

import typer

from safemerge_recipes.cli import experiments, masks, publish, recipes, run, scores, training, verify
from safemerge_recipes.cli.options import VersionOption
from safemerge_recipes.cli.program import run_program

HELP = {"help_option_names": ["-h", "--help"]}


app = typer.Typer(
    name="safemerge",
    help="Restore the safety of fine-tuned language models with declarative, gated merge recipes.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings=HELP,
)


@app.callback()
def _options(version: VersionOption = False) -> None:
    """The options of the program itself."""


for verb in (
    run.run, run.finalize, run.plan, run.validate, run.lock, experiments.controls, run.plugins, run.schema,
    scores.evaluate, scores.compare, scores.judge, experiments.sweep, experiments.probe, scores.report, masks.score,
    verify.verify, verify.sign, publish.publish, training.train_adapter, training.prepare_safety_data,
):  # fmt: skip
    app.command()(verb)
app.command()(recipes.init)
app.command()(recipes.recipes)
app.command("import")(recipes.import_)  # whose name is a word of Python's
app.command("mergekit-yaml", context_settings={"ignore_unknown_options": True})(recipes.mergekit_yaml)


def main(arguments: list[str] | None = None) -> None:
    """The program `safemerge`."""
    run_program(app, "safemerge", arguments)


run_app = typer.Typer(name="safemerge-run", pretty_exceptions_enable=False, context_settings=HELP)
run_app.command(context_settings=HELP)(run.run)


def run_main(arguments: list[str] | None = None) -> None:
    """The program `safemerge-run`: `safemerge run` under the name of its promise."""
    run_program(run_app, "safemerge-run", arguments)


if __name__ == "__main__":
    main()
