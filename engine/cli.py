"""The ``drumline`` command. Each subcommand is imported when it is called, so that ``--help`` answers at once."""

from __future__ import annotations

import importlib
import signal
from importlib.metadata import version

import click


class LazyGroup(click.Group):
    """A group whose commands are named by "module:attribute" and one line of help."""

    def __init__(self, homes: dict[str, tuple[str, str]], **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self._homes = homes

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*self._homes, *super().list_commands(ctx)])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        home = self._homes.get(cmd_name)
        if home is None:
            return super().get_command(ctx, cmd_name)
        module, _, attribute = home[0].partition(":")
        command = getattr(importlib.import_module(module), attribute)
        if not isinstance(command, click.Command):
            raise TypeError(f"{home[0]} is no command")
        return command

    def invoke(self, ctx: click.Context) -> object:
        """Ctrl-C has the same status while a command is being imported as while it runs; click's own would be 1."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            ctx.exit(128 + signal.SIGINT)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(
                [(name, self._homes[name][1]) for name in self.list_commands(ctx) if name in self._homes]
            )


bench = LazyGroup(
    {
        "scheduler": ("drumline.engine.commands.bench:scheduler", "coordinator work per decode step, in microseconds"),
        "eplb": ("drumline.engine.commands.bench_eplb:eplb", "what a balancing policy makes of expert loads"),
        "shuffle": ("drumline.engine.commands.bench_shuffle:shuffle", "experts that move while streams run"),
    },
    name="bench",
    help="Measure drumline.",
    short_help="measure drumline",
)

main = LazyGroup(
    {
        "generate": ("drumline.engine.commands.generate:generate", "continue prompts with a model"),
        "layout": ("drumline.engine.commands.layout:layout", "which rank holds what of a model"),
        "chaos": ("drumline.engine.commands.chaos:chaos", "random faults on an engine under load"),
        "bench": ("drumline.engine.cli:bench", "measure drumline"),
    },
    name="drumline",
    help="Serve mixture-of-experts language models over many ranks.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
click.version_option(version("drumline"), prog_name="drumline")(main)
