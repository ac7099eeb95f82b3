"""The order of the house: which folder may import which, what an import loads, how long a file may be, what the pages name."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

FOLDERS = ("ops", "run", "sources", "collecting", "analysis")
ENTRIES = ("train", "collect", "analyze", "formats")
# What each room may import of the project. Beside that, sources/live.py imports `collecting`, which loads nnsight; it is
# therefore imported inside functions only, and so is `collecting` in sources/opening.py, which opens the models for it.
MAY_IMPORT = {
    "config": set(),
    "ops": {"ops"},
    "crosscoder": {"ops"},
    "run": {"run", "crosscoder", "ops"},
    "sources": {"sources", "run", "crosscoder", "ops"},
    "collecting": {"collecting", "run", "crosscoder", "ops"},
    "analysis": {"analysis", "sources", "collecting", "run", "crosscoder", "ops"},
    **{entry: {*FOLDERS, "crosscoder", "config", "formats"} for entry in ENTRIES},
}
READ_CONFIG = {"run/flags.py", "sources/opening.py"}
# Libraries that one room alone knows.
ONLY_IN = {
    "nnsight": ("collecting/",),
    "transformers": ("collecting/",),
    "torch.distributed": ("ops/shard.py",),
    "triton": ("ops/kernels.py",),
    "tyro": ("run/flags.py", "config.py"),
    "wandb": ("run/monitor.py",),
    "matplotlib": ("analysis/report.py",),
}


def product_files() -> list[Path]:
    return [*sorted(ROOT.glob("*.py")), *(file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py")))]


def functions(tree: ast.AST) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def imported(file: Path) -> list[tuple[str, bool]]:
    """(module, whether inside a function) of every import that runs; `from a import b` counts as a.b too.

    What stands under `if TYPE_CHECKING:` is for mypy alone.
    """
    found = []
    tree = ast.parse(file.read_text())
    inside = {node for function in functions(tree) for node in ast.walk(function)}
    blocks = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    unread = {node for block in blocks for node in ast.walk(block)}
    for node in set(ast.walk(tree)) - unread:
        if isinstance(node, ast.Import):
            found += [(alias.name, node in inside) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(f"{node.module}.{alias.name}", node in inside) for alias in node.names]
    return found


def test_the_root_holds_the_entries_the_knobs_and_the_model():
    assert {file.stem for file in ROOT.glob("*.py")} == {*ENTRIES, "config", "crosscoder"}


@pytest.mark.parametrize("file", product_files(), ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_run_one_way(file):
    name = str(file.relative_to(ROOT))
    room = file.stem if file.parent == ROOT else file.parent.name
    for module, inside in imported(file):
        target = module.split(".")[0]
        if target in (*FOLDERS, *ENTRIES, "crosscoder", "config"):
            allowed = target in MAY_IMPORT[room]
            allowed |= target == "config" and name in READ_CONFIG
            allowed |= target == "collecting" and (name == "sources/live.py" or (name == "sources/opening.py" and inside))
            allowed &= inside or not module.startswith("sources.live")
            assert allowed, f"{name} imports {module}"
        for library, places in ONLY_IN.items():
            if module == library or module.startswith(f"{library}."):
                assert name.startswith(places), f"{name} imports {library}, which belongs to {places}"


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        (
            "crosscoder",
            ("nnsight", "transformers", "datasets", "huggingface_hub", "tyro", "numpy.ma", "torch.distributed.tensor"),
        ),
        ("analysis.measure", ("nnsight", "transformers")),
        ("sources.opening", ("nnsight", "transformers")),
    ],
)
def test_what_an_import_does_not_load(module, absent):
    program = f"import sys, {module}; print(*[name for name in {absent!r} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


def test_no_file_and_no_function_is_too_long_to_read():
    long = []
    for file in [*product_files(), *(ROOT / "tests").glob("*.py")]:
        text = file.read_text()
        name, lines = str(file.relative_to(ROOT)), len(text.splitlines())
        if lines > 420:
            long.append(f"{name}: {lines} lines")
        for function in functions(ast.parse(text)) if file.parent.name != "tests" else []:
            lines = function.end_lineno - function.lineno + 1
            if lines > (150 if (name, function.name) == ("train.py", "main") else 90):
                long.append(f"{name}: {function.name} has {lines} lines")
    assert not long, long


def test_every_folder_says_in_one_line_what_lives_there():
    for folder in FOLDERS:
        (line,) = (ROOT / folder / "__init__.py").read_text().splitlines()
        assert line.startswith('"""') and line.endswith('."""')


@pytest.mark.parametrize("file", sorted((ROOT / "tests").glob("*.py")), ids=lambda file: file.name)
def test_no_test_file_imports_another(file):
    assert [module for module, _ in imported(file) if module.startswith(("test_", "conftest"))] == []


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *ROOT.glob("*/*.md")], ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_that_a_page_names_exists(page):
    places = [ROOT, page.parent, *(ROOT / folder for folder in (*FOLDERS, "tests", "benchmarks"))]
    for name in re.findall(r"[\w/]+\.py\b", page.read_text()):
        assert any((place / name).is_file() for place in places), f"{name} does not exist"


def test_links_between_pages_lead_to_a_heading():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("*/*.md")]
    heads = {page.resolve(): re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE) for page in pages}
    anchors = {page: {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in of} for page, of in heads.items()}
    for page in pages:
        for path, anchor in re.findall(r"(?<!!)\[[^\]]*\]\((?!http)([^)#\s]*)#?([^)\s]*)\)", page.read_text()):
            target = (page.parent / path).resolve() if path else page.resolve()
            assert target.exists() and (not anchor or anchor in anchors[target]), f"{page.name}: {path}#{anchor}"


def test_the_package_says_what_the_other_files_say():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    version = project["project"]["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == version
    wanted = [line.split("#")[0].strip() for line in (ROOT / "requirements-dev.txt").read_text().splitlines()[1:]]
    assert project["project"]["optional-dependencies"]["dev"] == [line.replace('"', "'") for line in wanted if line]
    packed = project["tool"]["setuptools"]
    assert {*packed["packages"]} == {*FOLDERS} and {*packed["py-modules"]} == {*ENTRIES, "config", "crosscoder"}


def test_the_architecture_page_names_every_file():
    tree = (ROOT / "docs" / "architecture.md").read_text().split("```")[1].split()
    assert [file.name for file in product_files() if file.name not in ("__init__.py", *tree)] == []
