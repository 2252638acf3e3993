"""kvguard config init | validate | show.

Knows: config.py. Must not know: daemons.
"""

from __future__ import annotations

import dataclasses
import json

import click

from kvguard import config as settings
from kvguard.cli.options import output_option
from kvguard.errors import BadConfig

SECTIONS = click.Choice(sorted(settings.KINDS))


@click.group()
def config() -> None:
    """Write, check and show configurations."""


@config.command()
@click.argument("section", type=SECTIONS, default="node")
@click.option("--name", help="The name to write in.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="A setting to write in, checked. Several may be given.")
def init(section: str, name: str | None, assignments: tuple[str, ...]) -> None:
    """Print a commented configuration of SECTION to stdout."""
    given = [f"name={name}"] if name else []
    click.echo(settings.template(settings.KINDS[section], assigned(settings.KINDS[section], [*given, *assignments])), nl=False)


def assigned(kind: type, assignments: list[str]) -> dict[str, object]:
    """The values of KEY=VALUE, each checked alone. Raises BadConfig with every fault."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    values, faults = {}, []
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if key not in fields or not equals:
            faults.append(f"{assignment!r} is not KEY=VALUE with a setting of [{kind.SECTION}]. Try: one of {', '.join(fields)}")
            continue
        try:
            values[key] = settings.converted(fields[key], text, True)
        except ValueError as error:
            what, _, attempt = str(error).partition("|")
            faults.append(f"{key}: {what}. Try: {attempt or settings.example(fields[key])}")
    if faults:
        raise BadConfig("\n".join(faults))
    return values


def sections_of(file: str) -> list[str]:
    """The processes that a file configures."""
    faults: list[settings.Fault] = []
    tables = [settings.parse(path, faults)[0] for path in settings.layers(file, faults)[:1]]  # who loads them says what is wrong with them
    found = [section for section in sorted(settings.KINDS) if any(section in table for table in tables)]
    return found or ["node"]


@config.command()
@click.argument("files", nargs=-1, required=True, type=click.Path())
@output_option
def validate(files: tuple[str, ...], output: str) -> None:
    """Check FILES, with conf.d and the environment, for every process that they configure. Exit code 78 where one is wrong."""
    faults, good = [], []
    for file in files:
        for section in sections_of(file):
            try:
                settings.load(settings.KINDS[section], file)
            except BadConfig as error:
                faults += [line for line in str(error).splitlines() if line not in faults]
            else:
                good.append({"file": file, "section": section})
                if output == "table":
                    click.echo(f"{file}: [{section}] is good")
    if output == "json":
        click.echo(json.dumps({"schema": "kvguard.validation/1", "good": good, "faults": faults}))
    if faults:
        raise BadConfig("\n".join(faults))


@config.command()
@click.option("--config", "file", type=click.Path(), help="The configuration file.")
@click.option("--section", type=SECTIONS, help="Which process's; by default all that the file configures.")
@click.option("--effective", is_flag=True, help="Every setting with where it comes from, not only those that were set.")
@click.option("-o", "output", type=click.Choice(["toml", "json"]), default="toml")
def show(file: str | None, section: str | None, effective: bool, output: str) -> None:
    """Show the settings as a process would see them."""
    document = {}
    for name in [section] if section else sections_of(file) if file else ["node"]:
        loaded, origins = settings.load_with_origins(settings.KINDS[name], file)
        values = dataclasses.asdict(loaded)
        document[name] = {key: {"value": values[key], "origin": origins[key]} for key in values if effective or origins[key] != "default"}
    if output == "json":
        click.echo(json.dumps({"schema": "kvguard.config/1", "sections": document}))
        return
    for name, entries in document.items():
        click.echo(f"[{name}]")
        for key, entry in entries.items():
            click.echo(f"{key} = {settings.literal(entry['value'])}" + (f"  # {entry['origin']}" if effective else ""))
