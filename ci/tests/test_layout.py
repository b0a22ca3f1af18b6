"""The shape of the repository: who may import whom, and what every paper has."""

import ast
import dataclasses
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools.list import papers, recipes

ROOT = Path(__file__).resolve().parent.parent.parent
FILES = ["README.md", "Makefile", "requirements.txt", "__main__.py", "model.py", "recipes.py", "train.py",
         "evaluate.py", "demo.py", "cases.py", "tests/golden.json"]
# Each room stands on those below it, and on nothing beside it.
FLOORS = {"common.run": 0, "common.data": 1, "common.kernels": 1, "common.metrics": 2, "papers": 3, "tools": 4, "ci": 5}
# A paper's files, each importing only what comes before it. Others find their place by having no circle.
ORDER = [["recipes"], ["model"], ["official", "loss", "data"], ["tracker"], ["evaluate"], ["figures"], ["train"],
         ["compare"], ["__main__"]]
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
HABITS = {  # the field's word, spelt once: what nobody calls it any more
    "lr": ("base_lr", "learning_rate"), "init": ("weights", "start", "connection", "pretrained"),
    "backbone_lr_scale": ("backbone_lr",), "milestones": ("drop_epoch", "drop_epochs", "decay_epochs"),
    "compare": ("contenders", "mixings"), "crop_scale": ("crop_area",), "--seeds": ("seeds",),
    "nothing": ("layer_decay",),
}
SOURCES = sorted(
    path for room in ("common", "papers", "tools") for path in (ROOT / room).rglob("*.py")
    if not {"tests", "configs", "mm_configs"} & set(path.relative_to(ROOT).parts)
)


def module(path: Path) -> str:
    """Its name as others import it."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module(path) for path in SOURCES}


def statements(path: Path) -> list[tuple[ast.stmt, bool]]:
    """(import statement, whether it stands inside a function)"""
    found = []

    def walk(node: ast.AST, inside: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import | ast.ImportFrom):
                found.append((child, inside))
            walk(child, inside or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    walk(ast.parse(path.read_text(encoding="utf-8")), False)
    return found


def targets(path: Path, node: ast.stmt) -> set[str]:
    """Absolute names of what a statement imports: a module of ours where there is one, else as it is written."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    package = path.relative_to(ROOT).with_suffix("").parts[: -node.level] if node.level else ()
    base = ".".join([*package, *([node.module] if node.module else [])])
    whole = {f"{base}.{alias.name}" for alias in node.names}
    return {name if name in MODULES else base for name in whole}


def imports(path: Path) -> set[str]:
    return set().union(*(targets(path, node) for node, _ in statements(path)))


def room(name: str) -> str | None:
    return next((each for each in FLOORS if name == each or name.startswith(each + ".")), None)


@pytest.mark.parametrize("path", SOURCES, ids=module)
def test_a_room_stands_on_those_below_it(path):
    own = room(module(path))
    for name in imports(path):
        if (other := room(name)) and other != own:
            assert FLOORS[other] < FLOORS[own], f"{module(path)} imports {name}"
    if own == "papers":
        paper = ".".join(module(path).split(".")[:2])
        others = {name for name in imports(path) if room(name) == "papers" and f"{name}.".find(f"{paper}.") != 0}
        assert others <= {"papers"}, f"{module(path)} may import common and {paper}, not {others}"


@pytest.mark.parametrize("path", SOURCES, ids=module)
def test_what_is_ours_is_imported_at_the_top(path):
    """Inside a function stands only what may be missing, or takes long to import and is seldom needed."""
    for node, inside in statements(path):
        ours = {name for name in targets(path, node) if room(name)}
        assert not (inside and ours), f"{module(path)}:{node.lineno} imports {ours} inside a function"


def test_no_circle():
    graph = {module(path): (imports(path) & MODULES) - {module(path)} for path in SOURCES}
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle
    for name in order:
        print(f"{name}: {', '.join(sorted(graph.get(name, ()))) or '-'}")
    assert set(order) == MODULES


@pytest.mark.parametrize("path", [p for p in SOURCES if p.parent.parent.name == "papers"], ids=module)
def test_a_papers_files_have_an_order(path):
    rank = RANK.get(path.stem)
    if rank is None:
        return
    for name in imports(path):
        other = RANK.get(name.split(".")[-1]) if name.startswith(module(path.parent / "x").rsplit(".", 1)[0]) else None
        assert other is None or other < rank, f"{module(path)} imports {name}"


def test_common_has_four_rooms():
    kept = {p.name for p in (ROOT / "common").iterdir() if p.name != "__pycache__"}
    assert kept == {"run", "data", "kernels", "metrics", "tests", "__init__.py", "paper.mk"}


@pytest.mark.parametrize("path", [p for p in SOURCES if p.parent.name == "tools"], ids=module)
def test_a_tool_knows_no_paper_by_name(path):
    text = path.read_text(encoding="utf-8")
    assert path.stem == "new_paper" or not re.findall("|".join(papers()), text)  # which copies one as its model


@pytest.mark.parametrize("path", [p for top in ("common", "papers", "tools", "ci") for p in (ROOT / top).rglob("*.py")],
                         ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_is_one_thing(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 450


@pytest.mark.parametrize("paper", papers())
def test_a_train_function_can_be_read(paper):
    tree = ast.parse((ROOT / "papers" / paper / "train.py").read_text(encoding="utf-8"))
    (train,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "train")
    assert train.end_lineno - train.lineno + 1 <= 115


@pytest.mark.parametrize("paper", papers())
def test_recipes_speak_one_language(paper):
    for name, recipe in recipes(paper).RECIPES.items():
        fields = {field.name for field in dataclasses.fields(recipe)}
        for word, others in HABITS.items():
            assert not fields & set(others), f"{paper} {name}: {fields & set(others)} is {word} everywhere"


@pytest.mark.parametrize("paper", papers())
def test_a_paper_has_the_same_files_as_all_others(paper):
    missing = [name for name in FILES if not (ROOT / "papers" / paper / name).is_file()]
    assert not missing, f"papers/{paper} lacks {missing}"


@pytest.mark.parametrize("paper", papers())
def test_recipes_load_without_any_package(paper):
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tools.list import recipes; r = recipes({paper!r}); "
    script += "assert {'tiny', 'smoke'} <= set(r.RECIPES); print(r.TITLE, r.CLAIM)"
    subprocess.run([sys.executable, "-I", "-S", "-c", script], check=True)


@pytest.mark.parametrize("paper", papers())
def test_every_recipe_says_what_it_is(paper):
    for name, recipe in recipes(paper).RECIPES.items():
        assert recipe.about and "\n" not in recipe.about, name


@pytest.mark.parametrize("paper", papers())
def test_requirements_are_pinned(paper):
    pinned = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    lines = (ROOT / "papers" / paper / "requirements.txt").read_text().splitlines()
    wanted = {re.split("[<>=!~ ;]", line)[0].lower() for line in lines if line and not line.startswith("#")}
    assert wanted <= pinned


@pytest.mark.parametrize("paper", papers())
def test_processes_that_tests_start_stay_on_the_cpu(paper):
    """Or two of them would ask for two GPUs, and one would be measured by a CPU's tolerances."""
    for path in (ROOT / "papers" / paper / "tests").glob("test_*.py"):
        text = path.read_text(encoding="utf-8")
        assert "common.run.launch" not in text or '"--device", "cpu"' in text, path
        assert "torch.distributed.run" not in text, f"{path} opens a port"
