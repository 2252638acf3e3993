"""Every call that the CUDA device makes of cupy and of cuda-bindings is there, with these arguments. Skipped for the one that isn't installed.

CI has cuda-bindings. Read out of the sources' syntax: no call is made. cupy's runtime has no Python signatures; its docstrings begin with them.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
from pathlib import Path

import pytest

import kvguard.device

LIBRARIES = {"cupy": "cupy", "cuda-bindings": "cuda.bindings.driver"}


def installed(library: str):
    """The module. Skips the test where it isn't there, fails it where everything that can be had is wanted."""
    try:
        return importlib.import_module(LIBRARIES[library])
    except ImportError as error:
        assert library == "cupy" or not os.environ.get("KVGUARD_REQUIRE_ALL"), f"{library} isn't installed: tools/setup.sh test ({error})"
        pytest.skip(f"{library} is not installed: pip install 'kvguard[cuda13]'")


def roots(library: str) -> dict[str, object]:
    """What each name in the sources stands for."""
    module = installed(library)
    if library == "cuda-bindings":
        return {"_driver": module, "driver": module}
    return {"_runtime": module.cuda.runtime, "runtime": module.cuda.runtime, "_cupy": module, "cupy": module}


CALLS = re.compile(r"_runtime\.|_driver\.cu|_cupy\.", re.IGNORECASE)
SOURCES = sorted(path for path in Path(kvguard.device.__file__).parent.rglob("*.py") if CALLS.search(path.read_text()))
ROOTS = ("_runtime", "runtime", "_cupy", "cupy", "_driver", "driver")


def dotted(node: ast.expr) -> list[str]:
    """self._runtime.malloc -> [self, _runtime, malloc]; [] for anything else."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.insert(0, node.attr)
        node = node.value
    return [node.id, *names] if isinstance(node, ast.Name) else []


def found(path: Path) -> list[tuple[str, int, list[str], list[ast.expr] | None, list[str]]]:
    """(root, line, names under it, positional arguments of a call or None, keywords) of every use of the two libraries."""
    uses = []
    tree = ast.parse(path.read_text())
    calls = {id(node.func): (node.args, [keyword.arg for keyword in node.keywords]) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):  # asked(self._driver.cuX, a, b) is a call of cuX with a and b
        if isinstance(node, ast.Call) and node.args and dotted(node.func)[-1:] in (["asked"], ["_asked"]):
            calls[id(node.args[0])] = (node.args[1:], [])
    for node in ast.walk(tree):
        names = dotted(node) if isinstance(node, ast.Attribute) else []
        names = names[1:] if names[:1] == ["self"] else names
        if len(names) > 1 and names[0] in ROOTS and (names[0] != "driver" or names[1][:2].lower() == "cu"):
            uses.append((names[0], node.lineno, names[1:], *calls.get(id(node), (None, []))))
    return uses


def bounds(target) -> tuple[int, float]:
    """How few and how many positional arguments it takes."""
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):
        written = re.match(r"\w+\((.*?)\)", (target.__doc__ or "").replace("\n", " "))
        if written is None:
            return 0, float("inf")
        listed = [one.strip() for one in written[1].split(",") if one.strip()]
        listed = listed[: listed.index("*")] if "*" in listed else listed
        return sum("=" not in one for one in listed), len(listed)
    positional = [one for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    several = any(one.kind == one.VAR_POSITIONAL for one in parameters)
    return sum(one.default is one.empty for one in positional), float("inf") if several else len(positional)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_every_call_exists_with_these_arguments(path, library):
    uses, faults, modules = found(path), [], roots(library)
    assert any(arguments is not None for _, _, _, arguments, _ in uses), "no call was found: the source says it in another way"
    for root, line, names, arguments, keywords in uses:
        if root not in modules:
            continue
        target = modules[root]
        for name in names:
            target = getattr(target, name, None)
            if target is None:
                faults.append(f"line {line}: {root}.{'.'.join(names)} isn't there")
                break
        else:
            if arguments is None or any(isinstance(one, ast.Starred) for one in arguments) or isinstance(target, type):
                continue
            least, most = bounds(target)
            if not least <= len(arguments) + len(keywords) <= most:
                faults.append(f"line {line}: {root}.{'.'.join(names)} with {len(arguments)} arguments, takes {least} to {most}: {(target.__doc__ or '')[:90]}")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("library", "calls"),
    [
        ("cupy", {"malloc": "self._runtime.malloc(1, 2)", "mallocHost": "self._runtime.mallocHost(1)"}),
        ("cuda-bindings", {"cuDeviceGet": "self._asked(self._driver.cuDeviceGet)", "cuDeviceGot": "self._driver.cuDeviceGot(1)"}),
    ],
)
def test_a_call_that_is_not_there_would_be_seen(tmp_path, library, calls):
    modules = roots(library)
    (tmp_path / "some.py").write_text("class A:\n def f(self):\n" + "".join(f"  {call}\n" for call in calls.values()))
    uses = found(tmp_path / "some.py")
    assert [names[0] for _, _, names, _, _ in uses] == list(calls)
    for root, _, names, arguments, _ in uses:
        target = getattr(modules[root], names[0], None)
        assert target is None or not bounds(target)[0] <= len(arguments) <= bounds(target)[1]
