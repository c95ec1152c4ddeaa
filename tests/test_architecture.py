"""The package's layers: which room may import which, and how long a module, a class and a function may be."""

import ast
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import popup_surgery

PACKAGE = Path(popup_surgery.__file__).parent

# From the bottom up: a room imports only from rooms of earlier rows.
ROWS = (
    ("errors", "deprecated", "signals", "malloc"),
    ("atomic", "plugins", "torch_compat", "accelerate_compat", "timm_compat", "typer_compat"),
    ("plots", "weights", "hub"),
    ("selection",),
    ("models", "learners", "codecs"),
    ("masking",),
    ("artifact", "config"),
    ("data", "bank", "sharing", "exporting"),
    ("training",),
    ("experiment",),
    ("analysis",),
    ("sweep",),
    ("reproduce",),
    ("commands",),
    ("__main__",),
)
ROW = {name: row for row, names in enumerate(ROWS) for name in names}
APART = {("data", "artifact"), ("training", "artifact")}  # files and training meet in experiment/ alone

LONGEST = {"module": 450, "class": 300, "function": 60}

Module = tuple[str, ...]


def module_of(path: Path) -> Module:
    """`masking/state.py` is ("masking", "state"), `weights/__init__.py` is ("weights",)."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


FILES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
ROOT = ()  # popup_surgery/__init__.py, which looks names up when they are used


def imports(module: Module, types: bool = True) -> Iterator[tuple[int, Module]]:
    """Line and module of each import of a file from the package, inside functions too; `types`: for type checkers."""
    tree = ast.parse(FILES[module].read_text())
    only_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    package = module if FILES[module].name == "__init__.py" else module[:-1]
    for node in ast.walk(tree):
        if id(node) in only_types and not types:
            continue
        if isinstance(node, ast.ImportFrom):
            target = tuple(node.module.split(".")) if node.module else ()
            if node.level:
                target = package[: len(package) + 1 - node.level] + target
            elif target[0] == "popup_surgery":
                target = target[1:]
            else:
                continue
            for alias in node.names:  # a module, or a name in one
                yield node.lineno, next(m for m in ((*target, alias.name), target) if m in FILES)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "popup_surgery":
                    yield node.lineno, tuple(alias.name.split(".")[1:])


def test_imports_point_one_way() -> None:
    seen, wrong = set(), []
    for module, path in FILES.items():
        if module == ROOT:
            continue
        room = module[0]
        assert room in ROW, f"{room} has no place in the order; give it one in ROWS"
        for line, target in imports(module):
            if target == ROOT or target[0] == room:
                continue
            seen.add((room, target[0]))
            if ROW[target[0]] >= ROW[room] or (room, target[0]) in APART:
                wrong.append(f"{path.relative_to(PACKAGE)}:{line}: {room} imports {'.'.join(target)}")
    assert {room for room, *_ in filter(None, FILES)} == ROW.keys(), "a room in ROWS does not exist"
    assert ("experiment", "training") in seen
    assert ("commands", "experiment") in seen, "imports inside functions are seen"
    assert ("masking", "learners") in seen
    assert not wrong, "\n".join(wrong)


def test_no_two_modules_import_each_other() -> None:
    edges = {module: {t for _, t in imports(module, types=False)} - {module, ROOT} for module in FILES}
    assert ("weights", "streams") in edges["weights",]
    while leaves := [module for module, targets in edges.items() if not targets & edges.keys()]:
        for module in leaves:
            del edges[module]
    assert not edges, f"a circle among {sorted('.'.join(module) for module in edges)}"


def lengths() -> Iterator[tuple[str, str, int]]:
    """What it is, its name and its lines, for each module, class and function; of a function without its docstring."""
    for path in FILES.values():
        file, text = path.relative_to(PACKAGE).as_posix(), path.read_text()
        yield "module", file, len(text.splitlines())
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                what = "class" if isinstance(node, ast.ClassDef) else "function"
                first = node.body[0]
                docstring = what == "function" and ast.get_docstring(node) is not None
                lines = lines_of(node) - (lines_of(first) if docstring else 0)
                yield what, f"{file}:{node.name}", lines


def lines_of(node: ast.stmt) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def test_nothing_is_too_long() -> None:
    assert not [f"{name}, a {what} of {lines} lines" for what, name, lines in lengths() if lines > LONGEST[what]]


def test_the_rows_stand_in_the_docs_in_this_order() -> None:
    page = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text()
    places = [page.index(f"    {names[0]}") for names in ROWS[:-1]]
    assert all(a < b for a, b in pairwise(places))
