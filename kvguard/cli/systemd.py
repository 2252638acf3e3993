"""kvguard systemd print | install.

Knows: the unit files that come with kvguard, where a system wants them, and what this interpreter's path makes necessary. Must not know: daemons.
Invariants: a configuration that exists is never overwritten; a unit that was changed by hand is, after asking; nothing is enabled, started or reloaded here:
what is left to do is printed.
"""

from __future__ import annotations

import compileall
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

import click

import kvguard
from kvguard.cli import show
from kvguard.cli.options import output_option
from kvguard.errors import KvguardError

PROGRAM = "/usr/bin/kvguard"  # what stands in the files
HIDDEN_HOMES = ("/home", "/root", "/run/user")
HIDDEN_TMP = ("/tmp", "/var/tmp")
PRESERVE_VERSION = 254
DAEMONS = ("node", "coordinator")


class Placed(NamedTuple):
    """One file of an installation. `keep`: an existing one stays as it is."""

    path: str
    text: str
    keep: bool = False


def files() -> Path:
    """Where the files lie: installed beside this interpreter, or in the checkout. Raises KvguardError."""
    for place in (Path(sysconfig.get_path("data")) / "share/kvguard/systemd", Path(kvguard.__file__).resolve().parents[1] / "systemd"):
        if (place / "kvguard-node.service").is_file():
            return place
    raise KvguardError("the unit files did not come with this installation. Try: install kvguard from its wheel or a checkout")


def program() -> str:
    """How a unit calls this very installation."""
    script = Path(sys.executable).with_name("kvguard")
    return str(script) if script.is_file() else f"{sys.executable} -m kvguard.cli"


def below(path: str, places: tuple[str, ...]) -> bool:
    return any(path == place or path.startswith(f"{place}/") for place in places)


def needed() -> dict[str, None]:
    """Directories that a daemon started from this interpreter reads."""
    return dict.fromkeys((sys.prefix, sys.base_prefix, str(Path(kvguard.__file__).resolve().parents[1]), str(Path(sys.executable).resolve().parent)))


def closed() -> list[str]:
    """Directories on the way to those that other users may not enter: a service of its own user can't start from there."""
    ways = dict.fromkeys(way for path in needed() for way in (Path(path), *Path(path).parents))
    return [str(way) for way in ways if way.is_dir() and not way.stat().st_mode & 0o001]


def unit(name: str) -> str:
    """The text of a unit with this interpreter's path; where the sandbox would hide that, it is shown read-only."""
    text = (files() / name).read_text(encoding="utf-8").replace(PROGRAM, program())
    shown = needed()
    if any(below(path, HIDDEN_HOMES) for path in shown):
        text = text.replace("ProtectHome=yes", "ProtectHome=read-only")
    hidden = [path for path in shown if below(path, HIDDEN_TMP)]
    return text.replace("PrivateTmp=yes", f"PrivateTmp=yes\nBindReadOnlyPaths={' '.join(hidden)}") if hidden else text


def systemd_version() -> int:
    """0 where there is none."""
    try:
        said = subprocess.run(["systemctl", "--version"], capture_output=True, text=True, timeout=10, check=True).stdout
        return int(said.split()[1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return 0


def placed(daemons: tuple[str, ...], gpu: bool, version: int) -> list[Placed]:
    """All files of an installation, by absolute path."""
    source, found = files(), []
    for daemon in daemons:
        found.append(Placed(f"/etc/systemd/system/kvguard-{daemon}.service", unit(f"kvguard-{daemon}.service")))
        found.append(Placed(f"/etc/kvguard/{daemon}.toml", (source / f"{daemon}.toml").read_text(encoding="utf-8"), keep=True))
    extras = [name for name, wanted in (("preserve", version >= PRESERVE_VERSION), ("gpu", gpu)) if wanted and "node" in daemons]
    for name in extras:
        found.append(Placed(f"/etc/systemd/system/kvguard-node.service.d/{name}.conf", (source / f"drop-ins/{name}.conf").read_text(encoding="utf-8")))
    for kind in ("sysusers.d", "tmpfiles.d"):
        found.append(Placed(f"/etc/{kind}/kvguard.conf", (source / kind / "kvguard.conf").read_text(encoding="utf-8")))
    return found


@click.group()
def systemd() -> None:
    """The daemons as systemd services."""


daemons_argument = click.argument("daemons", nargs=-1, type=click.Choice(DAEMONS))
gpu_option = click.option("--gpu", is_flag=True, help="Also what a node needs whose pools lie on a GPU.")


@systemd.command("print")
@daemons_argument
@gpu_option
@output_option
def print_(daemons: tuple[str, ...], gpu: bool, output: str) -> None:
    """Print every file that `install` would write for DAEMONS (both without)."""
    found = placed(daemons or DAEMONS, gpu, systemd_version())
    if output == "json":
        show.document({"schema": "kvguard.systemd/1", "files": [one._asdict() for one in found]})
        return
    for one in found:
        click.echo(f"# {one.path}")
        click.echo(one.text)


@systemd.command()
@daemons_argument
@gpu_option
@click.option("--root", type=click.Path(file_okay=False), default="/", show_default=True, help="Write below this directory: an image, or a container's root.")
@click.option("--dry-run", is_flag=True, help="Say what would be written.")
@click.option("--yes", is_flag=True, help="Replace units that differ without asking.")
def install(daemons: tuple[str, ...], gpu: bool, root: str, dry_run: bool, yes: bool) -> None:
    """Write units, drop-ins, the user and example configurations for DAEMONS (both without)."""
    chosen, differing = daemons or DAEMONS, []
    work = []
    for one in placed(chosen, gpu, systemd_version()):
        path = Path(root) / one.path.lstrip("/")
        there = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
        what = "keeps" if there is not None and (one.keep or there == one.text) else "replaces" if there is not None else "writes"
        work.append((what, path, one))
        differing += [path] if what == "replaces" else []
    if differing and not yes and not dry_run:
        click.confirm(f"replace {', '.join(map(str, differing))}?", abort=True)
    for what, path, one in work:
        click.echo(f"{f'would {what[:-1]}' if dry_run and what != 'keeps' else what} {path}")
        if what != "keeps" and not dry_run:
            write(path, one.text)
    if root == "/" and not dry_run and not compiled(Path(kvguard.__file__).parent):
        click.echo("warning: kvguard's modules can't be compiled: every start of a daemon takes 0.2 s longer. Try: as root", err=True)
    for path in closed():
        click.echo(f"warning: {path} is closed to the user of the service. Try: an environment in /opt, or chmod o+x {path}", err=True)
    if not dry_run:
        click.echo(next_steps(chosen, root), err=True)


def compiled(package: Path) -> bool:
    """Compile what an installer has left as text (a checkout, say): the user of the service couldn't write it down, and would do it at every start."""
    return bool(compileall.compile_dir(str(package), quiet=2))


def write(path: Path, text: str) -> None:
    """Raises KvguardError where it can't."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        path.chmod(0o644)
    except OSError as error:
        raise KvguardError(f"{path} can't be written: {error.strerror}. Try: as root, or --root DIR") from error


def next_steps(daemons: tuple[str, ...], root: str) -> str:
    at = "" if root == "/" else f" --root={root}"
    units = " ".join(f"kvguard-{daemon}" for daemon in daemons)
    configurations = " ".join(f"/etc/kvguard/{daemon}.toml" for daemon in daemons)
    steps = [f"systemd-sysusers{at}", f"systemd-tmpfiles{at} --create", f"edit {configurations}; kvguard config validate {configurations}"]
    steps += [f"systemctl enable --now {units}"] if root != "/" else ["systemctl daemon-reload", f"systemctl enable --now {units}"]
    return "Next:\n" + "\n".join(f"  {step}" for step in steps)
