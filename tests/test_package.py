"""What the wheel holds, and what a clone without an install says."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    tracked = ["setup.py", "pyproject.toml", "README.md", "LICENSE", "wcr_fast", "kernels"]
    subprocess.run(["cp", "-r", *(str(ROOT / name) for name in tracked), str(source)], check=True)
    command = [sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", str(folder / "dist")]
    result = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (wheel,) = (folder / "dist").glob("*.whl")
    return zipfile.ZipFile(wheel).namelist()


def test_wheel_content(wheel_names):
    top = {name.split("/")[0] for name in wheel_names}
    assert {t for t in top if not t.endswith(".dist-info")} == {"wcr_fast"}
    for needed in ("py.typed", "watch.cpp", "torch_path/scan.c", "kernels/moments.py", "cli.py", "ops/moments.py"):
        assert f"wcr_fast/{needed}" in wheel_names
    for package in ROOT.glob("wcr_fast/**/__init__.py"):
        assert str(package.relative_to(ROOT)) in wheel_names
    assert len([n for n in wheel_names if n.startswith("wcr_fast/kernels/")]) == len(list(ROOT.glob("kernels/*.py")))


def test_benchmarks_without_an_install_say_so():
    code = "import sys; sys.modules['wcr_fast.kernels'] = None; import benchmarks"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 3
    assert result.stderr == "benchmarks need the package installed in place: pip install -e .\n"
