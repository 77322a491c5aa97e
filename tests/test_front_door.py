"""`import fluxchat`: what a program gets, from an editable install and from a wheel, and what is said when a
file of the user's own is in the way."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fluxchat
from encoder.budget import Budget
from tests import ROOT


def run(code: str, cwd: Path, *path: Path) -> subprocess.CompletedProcess[str]:
    """A Python of its own in `cwd`, which comes before `path` on its search path, as for any user."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True)


def test_the_front_door_has_what_it_says() -> None:
    assert fluxchat.Budget is Budget
    assert set(fluxchat.__all__) <= set(dir(fluxchat))
    for name in fluxchat.__all__:
        assert getattr(fluxchat, name)
    with pytest.raises(AttributeError, match="VideoChatt"):
        fluxchat.VideoChatt  # noqa: B018


def test_importing_it_loads_no_model_library(tmp_path: Path) -> None:
    code = "import sys, fluxchat; print(fluxchat.__version__, 'torch' in sys.modules, 'app' in sys.modules)"
    assert run(code, tmp_path, ROOT).stdout.split() == [fluxchat.__version__, "False", "False"]


@pytest.mark.parametrize(
    "name",
    [
        "app.py",
        *(
            pytest.param(n, marks=pytest.mark.slow)
            for n in ("encoder.py", "app/__init__.py", "llm_bridge/other.py")
        ),
    ],
)
def test_a_file_in_the_way_is_named_in_one_sentence(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("raise SystemExit('the foreign file ran')\n")
    ran = run("import fluxchat\ntry: fluxchat.VideoChat\nexcept ImportError as e: print(e)", tmp_path, ROOT)
    if name == "llm_bridge/other.py":  # a mere folder hides nothing: the package comes first
        assert ran.stdout == ""
        return
    assert ran.returncode == 0, ran.stderr
    assert str(tmp_path / name.split("/")[0]) in ran.stdout
    assert "rename it" in ran.stdout
    assert ran.stdout.count("\n") == 1


@pytest.mark.slow
def test_a_wheel_answers_in_an_empty_folder(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    source = tmp_path / "source"  # building leaves files beside the sources
    shutil.copytree(
        ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "site", "runs", "*.egg-info", "tests")
    )
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    wheel = next(tmp_path.glob("fluxchat-*.whl"))
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)
    clip = site / "app" / "pretrained" / "examples" / "flying-saucer-left.mp4"
    code = (
        "import fluxchat, app; print(app.__file__)\n"
        f"print(fluxchat.VideoChat().ask({str(clip)!r}, 'What is it?', budget=64).text)"
    )
    ran = run(code, empty, site)
    assert ran.returncode == 0, ran.stderr
    place, answer = ran.stdout.strip().splitlines()
    assert Path(place).is_relative_to(site)
    assert "saucer" in answer.lower()

    (empty / "app.py").write_text("raise SystemExit('the foreign file ran')\n")
    ran = run("import fluxchat\ntry: fluxchat.VideoChat\nexcept ImportError as e: print(e)", empty, site)
    assert "rename it" in ran.stdout
    ask = [sys.executable, str(site / "bin" / "fluxchat"), "ask", str(clip), "What is it?", "--budget", "64"]
    env = {**os.environ, "PYTHONPATH": str(site)}  # a script's own folder comes first, not the current one
    ran = subprocess.run(ask, cwd=empty, env=env, capture_output=True, text=True)
    assert "saucer" in ran.stdout.lower(), ran.stderr
