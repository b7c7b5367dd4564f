"""The wheel, as users install it: only the two packages, and the first half of the demo runs from it."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_it_holds_the_two_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"aligncurate", "aligntrain"}
    sources = {
        str(path.relative_to(ROOT)) for top in ("aligncurate", "aligntrain") for path in (ROOT / top).rglob("*.py")
    }
    assert sources <= set(names)
    assert {"aligncurate/py.typed", "aligntrain/py.typed"} <= set(names)


def test_the_demo_runs_from_it(wheel: Path, tmp_path: Path) -> None:
    """In an environment with the dependencies, but without the checkout: its .pth files are not read."""
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip())
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", "--quiet"]
    subprocess.run([*install, "--disable-pip-version-check", str(wheel)], check=True)
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")

    where = "import aligncurate, importlib.util as u; print(aligncurate.__file__, u.find_spec('pipelines'))"
    found = subprocess.run([python, "-c", where], cwd=tmp_path, check=True, capture_output=True, text=True, env={})
    assert found.stdout == f"{site / 'aligncurate' / '__init__.py'} None\n"

    command = [environment / "bin" / "aligncurate", "demo", "--no-train", "--count", "200", "--out", "demo"]
    demo = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})
    assert demo.returncode == 0, demo.stderr
    assert "fully right" in demo.stdout
    assert (tmp_path / "demo/shards/00000.tar").is_file()
