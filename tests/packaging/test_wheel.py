"""The wheel holds the whole tree, and works where the checkout is not."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("engine", "workers", "protocol")
PROJECT_FILES = ("pyproject.toml", "setup.py", "LICENSE")
DEMO_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json")


def run(*command: str | Path, cwd: Path) -> str:
    """The command's output. It does not see the checkout: neither as its folder nor through PYTHONPATH."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that no leftover of an earlier build in the checkout gets in."""
    source = tmp_path_factory.mktemp("source")
    for name in PROJECT_FILES:
        shutil.copy2(ROOT / name, source)
    if (ROOT / "README.md").exists():
        shutil.copy2(ROOT / "README.md", source)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", source / "dist", cwd=source)
    (built,) = (source / "dist").glob("drumline-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new venv with the wheel in it; dependencies come from this interpreter's folder, which spares torch.

    A folder named in a .pth file has its own .pth files ignored, so an editable install of the checkout stays unseen.
    """
    home = tmp_path_factory.mktemp("venv")
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home).strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--disable-pip-version-check"]
    run(*pip, "--no-deps", "--no-index", "--force-reinstall", wheel, cwd=home)
    return home


def test_every_package_of_the_tree_is_in_the_wheel(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    sources = {p.relative_to(ROOT) for name in PACKAGES for p in (ROOT / name).rglob("*.py")}
    missing = sorted(str(p) for p in sources if f"drumline/{p}" not in held)
    assert sources
    assert not missing
    assert {f"drumline/{name}/py.typed" for name in PACKAGES} <= held


def test_the_demo_model_is_in_the_wheel(wheel: Path) -> None:
    sizes = {entry.filename: entry.file_size for entry in zipfile.ZipFile(wheel).infolist()}
    for name in DEMO_FILES:
        assert sizes[f"drumline/engine/demo/{name}"] == (ROOT / "engine" / "demo" / name).stat().st_size


def test_the_shapes_of_well_known_models_are_in_the_wheel(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    shapes = {f"drumline/engine/model_shapes/{p.name}" for p in (ROOT / "engine" / "model_shapes").iterdir()}
    assert shapes
    assert shapes <= held


def test_the_schema_of_layouts_is_in_the_wheel(wheel: Path) -> None:
    schema = zipfile.ZipFile(wheel).read("drumline/engine/layout_report/layout.schema.json")
    assert schema == (ROOT / "engine" / "layout_report" / "layout.schema.json").read_bytes()


def test_the_namespace_has_no_init_of_its_own(wheel: Path) -> None:
    assert "drumline/__init__.py" not in zipfile.ZipFile(wheel).namelist()


def test_the_installed_packages_are_imported_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    program = (
        "import drumline.engine, drumline.workers, drumline.protocol\n"
        "print(*(m.__file__ for m in (drumline.engine, drumline.workers, drumline.protocol)), sep='\\n')"
    )
    files = [Path(line) for line in run(installed / "bin" / "python", "-c", program, cwd=tmp_path).split("\n") if line]
    assert len(files) == 3
    for path in files:
        assert path.is_relative_to(installed)
        assert not path.is_relative_to(ROOT)


def test_the_command_explains_itself_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    assert "generate" in run(installed / "bin" / "drumline", "--help", cwd=tmp_path)
