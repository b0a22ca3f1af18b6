"""The shape of the repository: who may import whom, and what every paper has."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tools.list import papers, recipes

ROOT = Path(__file__).resolve().parent.parent.parent
FILES = ["README.md", "Makefile", "requirements.txt", "model.py", "recipes.py", "train.py", "evaluate.py", "demo.py",
         "cases.py", "tests/golden.json"]


def imports(path: Path) -> set[str]:
    """Absolute names of everything a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(ROOT).with_suffix("").parts[: -node.level] if node.level else ()
            base = ".".join([*package, *([node.module] if node.module else [])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", sorted(ROOT.glob("papers/**/*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_paper_imports_common_and_itself_alone(path):
    own = ".".join(path.relative_to(ROOT).parts[:2]).removesuffix(".py")
    above = {name for name in imports(path) if name.split(".")[0] in ("papers", "tools", "ci")}
    others = {name for name in above if name != own and not name.startswith(own + ".")}
    assert others <= {"papers"}, f"{path} may import common and {own}, not {others}"


@pytest.mark.parametrize("path", sorted(ROOT.glob("common/**/*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_common_imports_nothing_above_it(path):
    assert not {name for name in imports(path) if name.split(".")[0] in ("papers", "tools", "ci")}


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
    wanted = (ROOT / "papers" / paper / "requirements.txt").read_text().splitlines()
    assert not {name for name in wanted if name and not name.startswith("#") and name.lower() not in pinned}
