"""The house rules that a program can check: imports go one way, files and functions stay short, parameters few."""

import ast
import graphlib
import io
from pathlib import Path
import re
import subprocess
import sys
import tokenize

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "arrol_jax"

# A package imports only from packages before it; so does a module on the top floor, from packages and from modules before it.
PACKAGES = "types running reporting rewards data models engine pruning learning serving".split()
READ_CONFIG = "config_ranges config assemble assemble_state assemble_service planning preflight course".split()
TOP = ["prune", "voting", "usage", *READ_CONFIG[:2], "step", "step_programs", *READ_CONFIG[2:], "benchmarks"]
ENTRY_POINTS = "train evaluate look chat bench get plan doctor serve jetstream".split()  # nothing imports them
ORDER = PACKAGES + TOP

MAX_FILE, MAX_FUNCTION, MAX_PARAMETERS = 400, 50, 8


def imported(tree: ast.AST, path: Path) -> set[str]:
  """Modules of this package that a file imports, anywhere in it, by their first name; "" for the package itself."""
  names = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}: a relative import; write the whole name"
      # "from arrol_jax import policy" names a module, "from arrol_jax.policy import forward" what is in one.
      names |= {f"{node.module}.{alias.name}" if node.module == "arrol_jax" else node.module for alias in node.names}
  return {(name.split(".") + [""])[1] for name in names if name.split(".")[0] == "arrol_jax"}


def modules():
  """(name, file) of every module; what is in the rewards package is `rewards`."""
  return [(path.relative_to(PACKAGE).parts[0].removesuffix(".py"), path) for path in sorted(PACKAGE.rglob("*.py"))
          if path != PACKAGE / "__init__.py"]


def test_every_module_has_its_place():
  assert {name for name, _ in modules()} - set(ENTRY_POINTS) == set(ORDER), "say in ORDER where a module belongs"


@pytest.mark.parametrize("name, path", modules(), ids=lambda x: x if isinstance(x, str) else x.name)
def test_imports_only_go_up_the_list(name, path):
  allowed = set(ORDER if name in ENTRY_POINTS else ORDER[:ORDER.index(name)])
  if name != path.stem:  # a package: its files import each other
    allowed |= {name}
  assert not imported(ast.parse(path.read_text()), path) - allowed


def test_no_modules_import_each_other_in_a_circle():
  """Not inside a package either, nor by an import inside a function."""
  name = lambda path: ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
  files = {name(path): path for path in PACKAGE.rglob("*.py")}
  graph = {module: set() for module in files}
  for module, path in files.items():
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Import):
        graph[module] |= {alias.name for alias in node.names} & set(files)
      elif isinstance(node, ast.ImportFrom):
        members = {f"{node.module}.{alias.name}" for alias in node.names}  # modules, or what is in one
        graph[module] |= members & set(files) | ({node.module} & set(files) if members - set(files) else set())
  assert sum(map(len, graph.values())) > len(graph)  # imports were found
  graph["arrol_jax.rewards.grade"].remove("arrol_jax.rewards.pool")  # the one exception: grade() hands over to a worker
  try:
    graphlib.TopologicalSorter(graph).prepare()
  except graphlib.CycleError as e:
    pytest.fail(" imports ".join(reversed(e.args[1])))


def test_only_the_config_and_what_assembles_read_the_config():
  """And planning, which proposes changes to it, preflight, which explains it, and a run's course. Everything below takes plain
  arguments."""
  for name, path in modules():
    if name not in [*ENTRY_POINTS, *READ_CONFIG]:
      assert "ml_collections" not in path.read_text(), path


def test_the_package_itself_imports_nothing_before_it_is_asked():
  tree = ast.parse((PACKAGE / "__init__.py").read_text())
  assert not imported(tree, PACKAGE / "__init__.py")


@pytest.mark.parametrize("statement", ["import arrol_jax.rewards", "import arrol_jax.rewards.pool",
                                       "from arrol_jax import grade"])
def test_graders_import_no_jax(statement):
  """Each worker process pays for its imports."""
  code = f"{statement}\nimport sys\nprint([m for m in ('jax', 'flax', 'numpy', 'transformers') if m in sys.modules])"
  done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
  assert done.stdout == "[]\n"


def sources():
  folders = ("arrol_jax", "configs", "experiments", "tests")
  return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def test_files_are_short():
  lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources()}
  assert not {name: length for name, length in lengths.items() if length > MAX_FILE}


def test_the_readme_is_read_to_its_end():
  lines = (ROOT / "README.md").read_text().splitlines()
  assert len(lines) <= 150 and max(map(len, lines)) <= 130


def test_functions_are_short():
  """All but a `main`, which may be a script that reads from top to bottom, and a `get_config`, which is a list."""
  long = {}
  for path in sources():
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name not in ("main", "get_config"):
        length = node.end_lineno - node.lineno + 1
        if length > MAX_FUNCTION:
          long[f"{path.relative_to(ROOT)}:{node.name}"] = length
  assert not long


def test_functions_take_few_parameters():
  many = {}
  for path in sources():
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        count = sum(len(x) for x in (node.args.posonlyargs, node.args.args, node.args.kwonlyargs))
        if count > MAX_PARAMETERS:
          many[f"{path.relative_to(ROOT)}:{node.name}"] = count
  assert not many


def test_modules_say_what_they_are():
  for path in sources():
    text = path.read_text()
    assert not text.strip() or ast.get_docstring(ast.parse(text)), path


def words_of(path: Path) -> str:
  """What a file says to its readers: a module's comments and longer texts; all of a page."""
  text = path.read_text()
  if path.suffix != ".py":
    return text
  tokens = tokenize.generate_tokens(io.StringIO(text).readline)
  return "\n".join(t.string for t in tokens if t.type == tokenize.COMMENT or '"""' in t.string)


def test_files_that_are_named_are_there():
  """A module that was moved takes its mentions with it. Readers' own files are my_..., DIR/..., and the like."""
  folders = [ROOT / name for name in ("arrol_jax", "configs", "experiments", "tests", "tpu_scripts")]
  there = [str(path.relative_to(ROOT)) for folder in folders for path in folder.rglob("*.py")]
  there += [path.name for path in ROOT.glob("*.py")]
  readers_own = re.compile(r"my[/_]|utils|DIR/|vllm/|(.*/)?[A-Z]+\.py")
  pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "experiments/README.md"]
  missing = [f"{path.relative_to(ROOT)}: {name}" for path in [*pages, *(ROOT / x for x in there)]
             for name in re.findall(r"(?<![\w./*{}-])((?:[\w-]+/)*[\w-]+\.py)\b", words_of(path))
             if path.name != "CHANGELOG.md" and not readers_own.match(name)
             and not any(f"/{x}".endswith(f"/{name}") for x in there)]
  assert missing == []


def test_what_users_rely_on_is_there():
  """The package's public names, reached the way README.md writes them."""
  code = """import arrol_jax
assert arrol_jax.grade(r"so \\\\boxed{12}", "12") == 1.0
assert arrol_jax.prune.Calibration().positive.shape == (128,)
assert arrol_jax.voting.vote(["1", "2", "2"]) == "2"
assert callable(arrol_jax.load_policy) and arrol_jax.Policy.__name__ == "Policy"
assert not hasattr(arrol_jax, "nothing")
print("ok")"""
  done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
  assert done.stdout == "ok\n", done.stderr
