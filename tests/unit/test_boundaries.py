"""Who may import whom, and what nobody may call: read from the source of every file, so that no path is missed."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("engine", "workers", "protocol", "tests", "tools")

FORBIDDEN_IMPORTS = {
    "engine": ("drumline.workers", "torch"),
    "workers": ("drumline.engine",),
    "protocol": ("drumline.engine", "drumline.workers"),
    "engine/core": ("asyncio", "zmq", "time", "socket", "threading", "random", "uvloop", "selectors", "secrets"),
}
FORBIDDEN_EVERYWHERE = ("pickle", "cPickle", "_pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib")
FORBIDDEN_CALLS = {"torch.load"}
QUEUES_WITHIN_A_PROCESS = {"asyncio.Queue", "queue.Queue", "queue.SimpleQueue"}
FORBIDDEN_METHODS = {
    "send_pyobj",
    "recv_pyobj",
    "all_gather_object",
    "gather_object",
    "scatter_object_list",
    "broadcast_object_list",
    "send_object_list",
    "recv_object_list",
}


def source_files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def package_of(path: Path) -> list[str]:
    """The dotted package that relative imports of this file start from."""
    parts = list(path.relative_to(ROOT).parent.parts)
    return ["drumline", *parts] if parts[0] in ("engine", "workers", "protocol") else parts


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of whatever the file imports, at any depth; `from a import b` gives a.b."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = package_of(path)
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and dotted(node.func).rpartition(".")[2] in ("import_module", "__import__"):
            constants = [a.value for a in node.args if isinstance(a, ast.Constant)]
            yield from ((name, node.lineno) for name in constants if isinstance(name, str))


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def aliases(path: Path) -> dict[str, str]:
    """What each imported name stands for: {"np": "numpy", "Queue": "multiprocessing.Queue"}."""
    found: dict[str, str] = {}
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found.update({alias.asname: alias.name for alias in node.names if alias.asname})
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
    return found


def calls(path: Path) -> Iterator[tuple[str, int]]:
    """(dotted name with imported names spelled out, line) of every attribute or name that is called."""
    known = aliases(path)
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and (name := dotted(node.func)):
            head, _, rest = name.partition(".")
            full = known.get(head, head)
            yield f"{full}.{rest}" if rest else full, node.lineno


def within(name: str, forbidden: tuple[str, ...]) -> bool:
    return any(name == banned or name.startswith(banned + ".") for banned in forbidden)


def at(path: Path, line: int, name: str) -> str:
    return f"{path.relative_to(ROOT)}:{line}: {name}"


@pytest.mark.parametrize("folder", FORBIDDEN_IMPORTS)
def test_a_folder_imports_only_what_it_may(folder: str) -> None:
    banned = FORBIDDEN_IMPORTS[folder]
    wrong = [at(p, line, n) for p in source_files(folder) for n, line in imports(p) if within(n, banned)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("folder", FOLDERS)
def test_nobody_imports_what_runs_code_from_bytes(folder: str) -> None:
    wrong = [at(p, line, n) for p in source_files(folder) for n, line in imports(p) if within(n, FORBIDDEN_EVERYWHERE)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("folder", FOLDERS)
def test_nobody_calls_what_pickles_inside(folder: str) -> None:
    wrong = [
        at(p, line, n)
        for p in source_files(folder)
        for n, line in calls(p)
        if n in FORBIDDEN_CALLS or n.rpartition(".")[2] in FORBIDDEN_METHODS or is_queue_between_processes(n)
    ]
    assert not wrong, "\n".join(wrong)


def is_queue_between_processes(name: str) -> bool:
    """multiprocessing's, under whatever name its context has; they pickle what is put."""
    queue = name.rpartition(".")[2] in ("Queue", "SimpleQueue", "JoinableQueue")
    return queue and "." in name and name not in QUEUES_WITHIN_A_PROCESS


def test_the_decisions_draw_no_unseeded_numbers() -> None:
    """numpy's generators are allowed in the core, but only with a seed handed in."""
    wrong = []
    for path in source_files("engine/core"):
        known = aliases(path)
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call) and (name := dotted(node.func)):
                head, _, rest = name.partition(".")
                full = f"{known.get(head, head)}.{rest}".strip(".")
                unseeded = full == "numpy.random.default_rng" and not (node.args or node.keywords)
                if unseeded or (
                    full.startswith("numpy.random.") and full[13:14].islower() and "default_rng" not in full
                ):
                    wrong.append(at(path, node.lineno, full))
    assert not wrong, "\n".join(wrong)


def test_importing_the_engine_leaves_torch_unloaded() -> None:
    program = (
        "import sys, drumline.engine; sys.exit(' '.join(m for m in sys.modules if m.split('.')[0] == 'torch') or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("source", "imported", "called"),
    [
        ("import torch.nn as nn\nnn.load()", "torch.nn", "torch.nn.load"),
        ("def f():\n    from torch import load as g\n    g(1)", "torch.load", "torch.load"),
        ("from ..workers import model\nmodel.x()", "drumline.workers.model", "model.x"),
        ("import importlib\nimportlib.import_module('pickle')", "pickle", "importlib.import_module"),
    ],
)
def test_the_reader_of_imports_sees_through_disguises(
    source: str, imported: str, called: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "engine" / "core" / "x.py"
    path.parent.mkdir(parents=True)
    path.write_text(source.replace("from ..workers", "from ...workers"))
    assert imported in [name for name, _ in imports(path)]
    assert called in [name for name, _ in calls(path)]
