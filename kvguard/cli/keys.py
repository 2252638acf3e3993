"""kvguard keys generate | list | rotate.

Knows: key files as transport/keys.py and rotating.py write them. Must not know: what is encrypted with them.
Invariants: a secret is never printed; no verb changes what a running process does: that is its reload.
"""

from __future__ import annotations

import re

import click

from kvguard.cli import show
from kvguard.cli.options import output_option
from kvguard.errors import BadConfig, NotAuthorised, Refused, TimedOut, Unreachable
from kvguard.transport import keys as keyring
from kvguard.transport import rotating


@click.group()
def keys() -> None:
    """Make, list and rotate keys."""


def named_keys(_context, _parameter, values: tuple[str, ...]) -> dict[str, bytes]:
    found = {}
    for value in values:
        matched = re.fullmatch(r"([^=\s]+)=(\S{40})", value)
        if not matched:
            raise click.BadParameter(f"{value!r} is not NODE=KEY with a key of 40 characters. Try: kvguard keys list FILE on that node")
        found[matched[1]] = matched[2].encode()
    return found


@keys.command()
@click.argument("file", type=click.Path(dir_okay=False))
@click.option("--allow", multiple=True, callback=named_keys, metavar="NODE=KEY", help="A peer (a node's or the coordinator's name) and its public key.")
def generate(file: str, allow: dict[str, bytes]) -> None:
    """Make a key pair in FILE (mode 0600) and print its public half. More peers are added as lines `allow NODE KEY`."""
    made = keyring.generate()
    keyring.save(keyring.Keys(made.secret, made.public, allow), file)
    keyring.load(file)  # what was written is what a daemon will read
    click.echo(f"public {made.public.decode()}")


@keys.command("list")
@click.argument("file", type=click.Path(exists=True, dir_okay=False))
@output_option
def list_(file: str, output: str) -> None:
    """The public key in FILE and the peers that it allows."""
    told = document(keyring.load(file))
    if output == "json":
        show.document(told)
        return
    click.echo(f"public {told['public']}")
    if told["next"]:
        click.echo(f"next   {told['next']}  (not in use: kvguard keys rotate {file} --switch)")
    rows = [[one["node"], one["public"], "goes with --finish" if one["superseded"] else "-"] for one in told["allowed"]]
    show.table("Allowed", ["node", "public", "rotation"], rows, "nobody")


def document(found: keyring.Keys) -> dict:
    """kvguard.keys/1. `next`: the public half of a pair that is not in use yet; `superseded`: the node is listed with a newer key too."""
    allowed = [
        {"node": node, "public": key.decode(), "superseded": key != found.of(node)[-1]} for node in sorted(found.allowed) for key in found.of(node)
    ]  # fmt: skip
    return {"schema": "kvguard.keys/1", "public": found.public.decode(), "next": found.coming[1].decode() if found.coming else None, "allowed": allowed}


@keys.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False))
@click.option("--allow", multiple=True, callback=named_keys, metavar="NODE=KEY", help="At everybody else: NODE's new key, beside its old one.")
@click.option("--switch", is_flag=True, help="Where the key is: the new pair in the place of the old one.")
@click.option("--finish", is_flag=True, help="Everywhere, at the end: of each node the newest key alone. Refused while one of them still uses an older one.")
@click.option("--unasked", is_flag=True, help="Finish without asking whether the others use their new keys: who doesn't is locked out.")
@click.option("--config", "place", type=click.Path(), envvar="KVGUARD_CONFIG", help="For --finish: a configuration that says where to ask.")
@click.option("--coordinator", "address", envvar="KVGUARD_COORDINATOR", help="For --finish: tcp://HOST:PORT of the coordinator.")
@click.option("--timeout", type=click.FloatRange(0.1, 3600.0), default=5.0, show_default=True, help="Seconds to wait for each answer.")
@click.option("--dry-run", is_flag=True, help="Say what would be done.")
@click.option("--yes", is_flag=True, help="Don't ask before old keys go.")
@output_option
def rotate(file: str, allow: dict[str, bytes], switch: bool, finish: bool, unasked: bool, dry_run: bool, yes: bool, output: str, **asking) -> None:
    """Another key for this process, without locking anybody out. After each step: reload (SIGHUP) whose FILE it is.

    \b
    1. kvguard keys rotate FILE                     where the key is: a new pair beside the old one; prints the new public key
    2. kvguard keys rotate FILE --allow NODE=KEY    everywhere else: both keys are good
    3. kvguard keys rotate FILE --switch            where the key is: the new pair is used
    4. kvguard keys rotate FILE --finish            everywhere: the old key is refused
    """
    if bool(allow) + switch + finish > 1:
        raise click.UsageError("--allow, --switch and --finish are steps of their own")
    step = rotating.allowing(allow) if allow else rotating.switched if switch else rotating.finished if finish else rotating.begun
    before = keyring.load(file)
    lines = step([], before)  # whether the step makes sense now
    if finish and not unasked:
        demand_switched(file, before, **asking)
    if finish:
        gone = [f"{key.decode()} of {node}" for node, olds in sorted(rotating.superseded(before).items()) for key in olds]
        said = f"{', '.join(gone)} will be refused"
        if not dry_run and not yes:
            click.confirm(f"{said}; who still uses it is locked out. Do it?", abort=True, err=True)
    else:
        said = "the pair that is in use now goes" if switch else f"lines are added: {len(lines)}"
    if dry_run:
        show.document({**document(before), "would": said}) if output == "json" else click.echo(f"would change {file}: {said}")
        return
    after = rotating.rewrite(file, step)
    if output == "json":
        show.document(document(after))
        return
    own = after.own_name() or "THIS_NODE"
    if not (allow or switch or finish):
        click.echo(f"Everywhere else: kvguard keys rotate FILE --allow {own}={after.coming[1].decode()}")
    click.echo(f"{file} is changed. Reload whose it is (systemctl reload kvguard-node, or kvguard-coordinator; SIGHUP).", err=True)


def demand_switched(file: str, before: keyring.Keys, place: str | None, address: str | None, timeout: float) -> None:
    """Raises Refused where somebody would be locked out who still uses a key that goes, or may."""
    from kvguard.cli.asking import Reach, found
    from kvguard.cli.superseded import unproved

    try:
        why = unproved(Reach(*found(place, address, file, False), timeout), before)
    except (BadConfig, Unreachable, TimedOut, NotAuthorised) as error:
        raise type(error)(f"nobody can say whether all use their new keys: {error} And with --unasked nobody is asked") from error
    if why:
        raise Refused(
            f"who still uses an older key would be locked out. {'; '.join(why)}. Try: kvguard keys rotate FILE --switch there, and reload; "
            "or --unasked, where you know better"
        )
