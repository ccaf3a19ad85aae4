"""The house rules, checked on the sources: import order, one home per concept, a README that names
what exists."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "nla_ray"
ORDER = (
    "settings",
    "run",
    "cpu",
    "base",
    "plan",
    "cluster",
    "text",
    "activation",
    "label",
    "score",
    "description",
    "training",
    "reinforce",
    "report",
    "export",
    "serve",
    "nano",
    "bench",
)
"""The rooms, in the direction data walks. None imports what stands to its right.

`cpu` stands far left because it knows torch alone, `base` before `plan` because a plan refuses what
a job refuses of a base, by the same functions, and `score` before `description` because training
and the report compare both by its figures. What looks at a base before anything is trained on it
(`score.stage`) is in `score`: it needs labels and figures.
"""
NAMED_BY_STRING = {"run/stages.py", "label/teacher.py", "text/stage.py"}
"""Tables that name functions to their right, `module:name`, loaded when they are chosen."""
HOMES = {
    "the connection to Ray": (r"\bray\.init\(", {"cluster/connect.py"}),
    "adapters (peft)": (
        r"^\s*(import peft|from peft)\b",
        # The last one prints the line on a card.
        {"base/adapters.py", "base/adapter_files.py", "export/adapter.py"},
    ),
    "GRPO from TRL": (r"\bGRPO(Trainer|Config)\b", {"reinforce/grpo.py", "bench/step.py"}),
    "SFT from TRL": (r"\bSFT(Trainer)\b", {"training/sft.py"}),
    "normalisation of vectors": (
        (
            r"F\.normalize|functional\.normalize|cosine_similarity\(|linalg\.(vector_)?norm\(|[^n]\.norm\(|\bdef"
            r" norm\("
        ),
        {"activation/vectors.py"},
    ),
    "the description tags": (r"</?description>", {"base/prompts.py"}),
    "the marker character": ("\\\\u320e|\u320e", {"settings/config.py"}),
    "the split of a document": (r"share < train_share", {"run/identity.py"}),
    "chat templates of prompts": (r"\.apply_chat_template\(", {"base/prompts.py"}),
}


def modules() -> dict[str, Path]:
    return {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}


def room(module: str) -> str:
    """The room of a dotted module name inside nla_ray; "" of the package itself."""
    return module.split(".")[1] if "." in module else ""


def imported_modules(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
            names.add(node.module)
    return {name for name in names if name == "nla_ray" or name.startswith("nla_ray.")}


@pytest.mark.parametrize("name", modules())
def test_no_module_imports_what_stands_to_its_right(name: str) -> None:
    dotted = "nla_ray." + name.removesuffix(".py").replace("/", ".")
    if name == "__init__.py":
        pytest.skip("the tour imports nothing before it is called")
    rank = ORDER.index(room(dotted))
    for imported in imported_modules(modules()[name]):
        if imported != "nla_ray":
            assert ORDER.index(room(imported)) <= rank, f"{dotted} imports {imported}"
        assert not (room(dotted) == "serve" and room(imported) in ("training", "reinforce")), (
            f"{dotted} imports {imported}: serving never imports training"
        )


def test_every_room_is_in_the_order_and_every_function_named_by_a_string_exists() -> None:
    import pkgutil

    assert {name.split("/")[0].removesuffix(".py") for name in modules()} - {"__init__"} == set(
        ORDER
    )
    named = {
        name: re.findall(r'"(nla_ray(?:\.\w+)+:\w+)"', path.read_text())
        for name, path in modules().items()
    }
    assert {name for name, found in named.items() if found} == NAMED_BY_STRING
    for found in named.values():
        for reference in found:
            assert callable(pkgutil.resolve_name(reference)), reference


@pytest.mark.parametrize("concept", HOMES)
def test_every_concept_has_one_home(concept: str) -> None:
    pattern, homes = HOMES[concept]
    found = {
        name
        for name, path in modules().items()
        if re.search(pattern, path.read_text(), re.MULTILINE)
    }
    assert found, f"nothing matches {pattern}: the rule checks nothing"
    assert found <= homes, f"{concept} also in {sorted(found - homes)}"


def test_only_the_training_loop_imports_deepspeed() -> None:
    found = {
        name
        for name, path in modules().items()
        if re.search(
            r"^\s*(import deepspeed|from deepspeed)|deepspeed\s*=", path.read_text(), re.MULTILINE
        )
    }
    assert found <= {
        "training/workers.py",
        "training/zero.py",
        "training/sft.py",
        "training/reconstruction.py",
        "reinforce/grpo.py",
    }
    stages = {name for name, path in modules().items() if '"zero_optimization"' in path.read_text()}
    assert stages == {"training/zero.py"}


def test_the_configuration_layer_is_light() -> None:
    import subprocess
    import sys

    code = (
        "import sys, nla_ray, nla_ray.settings.command_line; "
        "import nla_ray.run.stages, nla_ray.plan.text; "
        "print(sorted({'torch', 'ray', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


def test_top_level_is_what_the_architecture_fixes() -> None:
    import subprocess

    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout: the top level cannot be told from build output")
    top = {path.split("/")[0] for path in tracked}
    assert {name for name in top if not name.startswith(".")} <= {
        "pyproject.toml",
        "README.md",
        "cluster.yaml",
        "nla_ray",
        "jobs",
        "tests",
        "LICENSE",
    }


def readme() -> str:
    return (ROOT / "README.md").read_text()


def test_every_job_named_in_the_readme_exists_and_every_job_is_named() -> None:
    named = set(re.findall(r"jobs/(\w+)\.py", readme()))
    existing = {path.stem for path in (ROOT / "jobs").glob("*.py")}
    assert named == existing


def test_every_override_in_a_readme_command_is_a_field_of_the_configuration() -> None:
    import dataclasses

    from nla_ray.settings.presets import PRESETS

    config = next(iter(PRESETS.values()))()
    flags = re.findall(r"(?<=\s)--([a-z_]+)\.([a-z0-9-]+)", readme())
    assert flags
    for section, name in flags:
        fields = {field.name for field in dataclasses.fields(getattr(config, section))}
        assert name.replace("-", "_") in fields, f"--{section}.{name}"
    for name in re.findall(r"--preset[ =]([\w.-]*\w)", readme()):
        assert name in PRESETS


def test_the_rooms_of_the_readme_are_the_door_plates() -> None:
    rows = dict(re.findall(r"^\| `(\w+)/` \| (.*) \|$", readme(), re.MULTILINE))
    assert list(rows) == list(ORDER)
    for name, line in rows.items():
        plate = ast.get_docstring(ast.parse((PACKAGE / name / "__init__.py").read_text()))
        assert plate.splitlines()[0] == line


def test_jobs_are_thin() -> None:
    for path in (ROOT / "jobs").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 80, path.name


# Habits -------------------------------------------------------------------------------------------

LONGEST_FUNCTION = 60


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def public_names(path: Path) -> Iterator[str]:
    """Functions, classes and constants that a module defines."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                yield from (part.id for part in ast.walk(target) if isinstance(part, ast.Name))


def test_a_public_name_means_one_thing_in_the_whole_package() -> None:
    homes: dict[str, set[str]] = {}
    for name, path in modules().items():
        for public in public_names(path):
            if not public.startswith("_") and public != "logger":
                homes.setdefault(public, set()).add(name)
    assert {public: found for public, found in homes.items() if len(found) > 1} == {}


def test_functions_stay_short() -> None:
    found = {
        f"{path.relative_to(ROOT)}:{node.name}": node.end_lineno - node.lineno + 1
        for folder in ("nla_ray", "jobs")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for node in functions(path)
    }
    assert {name: lines for name, lines in found.items() if lines > LONGEST_FUNCTION} == {}


def test_the_first_line_of_a_docstring_is_a_sentence_of_one_line() -> None:
    """A first paragraph of several lines is read twice."""
    found = []
    for name, path in modules().items():
        tree = ast.parse(path.read_text())
        for node in (
            tree,
            *functions(path),
            *(n for n in tree.body if isinstance(n, ast.ClassDef)),
        ):
            lines = (ast.get_docstring(node) or "").splitlines()
            if len(lines) > 1 and lines[1]:
                found.append(f"{name}: {lines[0]}")
    assert found == []
