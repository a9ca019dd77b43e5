"""The house's floors: every import in `vlm_serve` and `api` goes downward, function-level imports included."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

FLOORS: dict[str, int] = {
    "api": 9,
    "vlm_serve.serving": 8,
    "vlm_serve.engine": 7,
    "vlm_serve.training": 7,
    "vlm_serve.families": 6,
    "vlm_serve.encoders": 5,
    "vlm_serve.decoders": 5,
    "vlm_serve.lora": 4,
    "vlm_serve.layers": 3,
    "vlm_serve.kernels": 2,
    "vlm_serve.clinical": 2,
    "vlm_serve.types": 1,
    "vlm_serve.config": 1,
    "vlm_serve.errors": 1,
    "vlm_serve.digests": 1,
    "vlm_serve.downloads": 1,
}
"""The table of the design. Units of one floor do not import each other, but for the ground floor's nouns."""

GROUND = 1
FACADE = "vlm_serve"
"""`vlm_serve/__init__.py` names `LLM` and `SamplingParams` for users; only `api`, above it all, may import it."""

TORCH_FREE = ("vlm_serve.clinical", "vlm_serve.types", "vlm_serve.config", "vlm_serve.errors", "vlm_serve.digests")
"""What the decode worker imports."""


@dataclass(frozen=True)
class Import:
    importer: str
    imported: str
    where: str


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def imported_names(node: ast.AST, package: str) -> Iterator[str]:
    """Dotted names that a statement or an `import_module("…")` call asks for, `from a import b` as `a.b`."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            parents = package.split(".")
            anchor = ".".join(parents[: len(parents) - node.level + 1])
            base = f"{anchor}.{base}" if base else anchor
        yield from (f"{base}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Call) and node.args:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
        target = node.args[0]
        if name in ("import_module", "__import__") and isinstance(target, ast.Constant):
            yield str(target.value)


def scan(root: Path) -> list[Import]:
    """Every import of every file of the two packages."""
    files = [path for top in ("vlm_serve", "api") for path in sorted((root / top).rglob("*.py"))]
    found = []
    for path in files:
        module = module_name(path, root)
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            line = getattr(node, "lineno", 0)
            found += [
                Import(module, name, f"{path.relative_to(root)}:{line}") for name in imported_names(node, package)
            ]
    return found


def unit(module: str) -> str | None:
    """The row of the table that a module belongs to."""
    return next((name for name in FLOORS if within(module, name)), None)


def violations(imports: list[Import]) -> list[str]:
    found = []
    for item in imports:
        if item.importer == FACADE or not (within(item.imported, "vlm_serve") or within(item.imported, "api")):
            continue
        importer, imported = unit(item.importer), unit(item.imported)
        edge = f"{item.where}: {item.importer} imports {item.imported}"
        if importer is None:
            found.append(f"{item.where}: {item.importer} is not in the table of floors")
        elif imported is None:
            if importer != "api":
                found.append(f"{edge}, but only api may import the facade or what is not in the table of floors")
        elif importer != imported and not FLOORS[importer] == FLOORS[imported] == GROUND:
            upper, lower = FLOORS[importer], FLOORS[imported]
            if upper == lower:
                found.append(f"{edge}, its sibling on floor {upper}")
            elif upper < lower:
                found.append(f"{edge}, upward from floor {upper} to floor {lower}")
    return found


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_every_import_goes_downward() -> None:
    found = violations(scan(ROOT))
    assert not found, "Imports must go downward (see the table of floors):\n" + "\n".join(found)


def test_every_module_of_the_house_has_a_floor() -> None:
    modules = {module_name(path, ROOT) for top in ("vlm_serve", "api") for path in (ROOT / top).rglob("*.py")}
    assert {module for module in modules - {FACADE} if unit(module) is None} == set()


def test_what_the_decode_worker_imports_is_free_of_torch() -> None:
    heavy = ("torch", "transformers", "timm", "torchvision")
    found = [
        f"{item.where}: {item.importer} imports {item.imported}"
        for item in scan(ROOT)
        if any(within(item.importer, light) for light in TORCH_FREE)
        and any(within(item.imported, name) for name in heavy)
    ]
    assert not found, "The decode worker must stay small:\n" + "\n".join(found)


def test_pydicom_is_imported_in_clinical_alone() -> None:
    found = [
        f"{item.where}: {item.importer} imports {item.imported}"
        for item in scan(ROOT)
        if within(item.imported, "pydicom") and not within(item.importer, "vlm_serve.clinical")
    ]
    assert not found, "A Dataset never leaves vlm_serve.clinical:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("vlm_serve/layers/a.py", "from vlm_serve.engine import step", "upward from floor 3 to floor 7"),
        ("vlm_serve/layers/a.py", "def f():\n    import vlm_serve.engine.step", "a.py:2"),
        ("vlm_serve/layers/a.py", "from ..lora import slots", "vlm_serve.lora.slots, upward"),
        ("vlm_serve/layers/a.py", "from .. import lora", "upward from floor 3 to floor 4"),
        ("vlm_serve/encoders/a.py", "from vlm_serve.decoders import decoder", "its sibling on floor 5"),
        ("vlm_serve/kernels/a.py", "from vlm_serve.clinical import image", "its sibling on floor 2"),
        ("vlm_serve/engine/a.py", "from vlm_serve import LLM", "only api may import the facade"),
        ("vlm_serve/engine/a.py", "import importlib\nimportlib.import_module('vlm_serve.serving')", "upward"),
        ("vlm_serve/serving/a.py", "import api.app", "upward from floor 8 to floor 9"),
        ("vlm_serve/utils.py", "import vlm_serve.types", "not in the table of floors"),
    ],
)
def test_an_upward_import_is_named_with_its_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    (found,) = violations(scan(write(tmp_path, {name: text})))
    assert message in found
    assert name in found


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("vlm_serve/engine/a.py", "from vlm_serve import types\nfrom vlm_serve.layers.context import ForwardContext"),
        ("vlm_serve/types.py", "from vlm_serve.errors import InvalidRequestError"),
        ("vlm_serve/__init__.py", "def f():\n    from vlm_serve.serving.llm import LLM"),
        ("vlm_serve/layers/__init__.py", "from .linear import Linear"),
        ("api/app.py", "from vlm_serve import LLM, __version__\nfrom vlm_serve.serving import llm\nimport torch"),
    ],
)
def test_a_downward_import_is_allowed(tmp_path: Path, name: str, text: str) -> None:
    assert violations(scan(write(tmp_path, {name: text}))) == []
