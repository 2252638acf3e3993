"""README and docs name what there is: pages, headings, files, verbs, options, settings with their defaults, metrics."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import click
import pytest

from kvguard.cli.group import verbs
from kvguard.config import NodeConfig
from kvguard.config.setting import converted
from kvguard.format.layout import Layout

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FOREIGN = {"adapters.md", "vllm.md"}  # they name other engines' own words, too
ROOMS = "tools|docs|tests|" + "|".join(sorted(path.name for path in (ROOT / "kvguard").iterdir() if path.is_dir() and path.name != "__pycache__"))
MADE = {"docs/measurements/gpu-NAME.json"}  # by a command of the page
SHELLS = {"fish_source"}  # click's own
SUFFIX = re.compile(r"_(total|bucket|sum|count)$")

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def anchors(page: Path) -> set[str]:
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)}


def code(page: Path) -> list[str]:
    """Lines of blocks, without what is said beside them, continued ones in one; and what stands between backticks."""
    parts = page.read_text().split("```")
    lines = [re.split(r"\s{2,}#|(?<=\S)\s{4,}", line)[0] for block in parts[1::2] for line in re.sub(r"\\\n\s*", "", block).splitlines()[1:]]
    return lines + words_of(page)


def words_of(page: Path) -> list[str]:
    return [span for text in page.read_text().split("```")[::2] for span in re.findall(r"`([^`\n]+)`", text)]


def sources() -> str:
    found = [path for room in ("kvguard", "tools", "tests") for path in (ROOT / room).rglob("*") if path.suffix in {".py", ".sh", ".conf", ".service"}]
    return "\n".join(path.read_text() for path in found if path != Path(__file__))


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    faults = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        name, _, heading = link.partition("#")
        there = (page.parent / name).resolve() if name else page
        if "://" not in link and (not there.exists() or heading and heading not in anchors(there)):
            faults.append(link)
    assert not faults, faults


@every_page
def test_files_that_are_named_exist(page: Path) -> None:
    named = set(re.findall(rf"(?<![\w./$-])((?:kvguard/)?(?:{ROOMS})/[\w./-]*\w)", page.read_text())) - MADE
    missing = [name for name in sorted(named) if not (ROOT / name).exists() and not (ROOT / "kvguard" / name).exists()]
    assert not missing, missing


@every_page
def test_verbs_and_options_that_are_named_exist(page: Path) -> None:
    faults = []
    for said in re.findall(r"(?:^|[\s/])kvguard ([a-z-][^|&;><)\n]*)", "\n".join(code(page)), re.MULTILINE):
        words, command = said.split(), verbs
        with click.Context(verbs) as context:
            while isinstance(command, click.Group) and words and re.fullmatch(r"[a-z-]+", words[0]) and not words[0].startswith("-"):
                found = command.get_command(context, words.pop(0))
                if found is None:
                    faults.append(f"kvguard {said}")
                    break
                command = found
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)} | {"--version", "--help"}
        faults += [f"kvguard {said}: {word}" for word in words if word.startswith("--") and word.partition("=")[0].rstrip(",") not in known]
    assert not faults, faults


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in FOREIGN], ids=lambda page: page.name)
def test_settings_counters_and_functions_that_are_named_exist(page: Path) -> None:
    text = sources()
    named = {word for word in words_of(page) if re.fullmatch(r"[a-z][a-z0-9]*(?:_[a-z0-9]+)+", word)} - SHELLS
    missing = [word for word in sorted(named) if word not in text and SUFFIX.sub("", word) not in text]
    assert not missing, missing


@pytest.mark.parametrize("page", ["gpu.md", "rdma.md"])
def test_defaults_that_are_said_are_the_defaults(page: str) -> None:
    fields = {field.name: field for field in dataclasses.fields(NodeConfig)}
    rows = re.findall(r"^\| `(\w+)` \| `?\"?([\w.,]+)\"?`? \|", (ROOT / "docs" / page).read_text(), re.MULTILINE)
    assert len(rows) >= 4 and all(converted(fields[name], said, True) == fields[name].default for name, said in rows), rows


def test_what_is_counted_in_words_is_as_many() -> None:
    """The README counts the drills."""
    from kvguard.drill.scenarios import SCENARIOS

    numbers = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty".split()
    assert f"{numbers[len(SCENARIOS)]} faults" in (ROOT / "README.md").read_text()
    listed = re.findall(r"^\| ([a-z-]+) \| SIG|^\| ([a-z-]+) \| [a-z]", (ROOT / "docs" / "drills.md").read_text(), re.MULTILINE)
    assert {name for pair in listed for name in pair if name} >= set(SCENARIOS)


def test_the_readmes_engine_runs_as_it_stands_there(tmp_path, monkeypatch) -> None:
    """Without a daemon: it says so, and serves on."""
    monkeypatch.setenv("KVGUARD_SOCKET", str(tmp_path / "nobody.sock"))
    said = (ROOT / "README.md").read_text().partition("## From an engine")[2].partition("```python\n")[2].partition("```")[0]
    names = {
        "layout": Layout.paged("toy-1", "float32", 2, 8, 16, 2, 8), "size": 5, "forward": lambda *_: None, "sequence": "one", "length": 5, "new_blocks": [0],
        "new_ids": [1, 2, 3, 4, 5, 6], "request": b"",
    }  # fmt: skip
    exec(said, names)
    guard = names["guard"]
    assert guard.table.sequences() == {"one": 0}
    with guard.step(1) as step:
        with pytest.raises(KeyError, match="Try: request="):
            step.commit("another", 1, blocks=[1], tokens=[1])
        step.commit("one", 6, tokens=[7], request=None)
    guard.detach()
    names["pool"].close()
