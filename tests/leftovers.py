"""A test run that leaves files behind in the repository fails: tests write under `tmp_path`."""

from __future__ import annotations

import subprocess

import pytest

BEFORE: pytest.StashKey[frozenset[str]] = pytest.StashKey()


def untracked(config: pytest.Config) -> frozenset[str]:
    """Files of the working tree that git neither knows nor ignores; none where there is no git."""
    command = ["git", "ls-files", "--others", "--exclude-standard", "-z"]
    try:
        found = subprocess.run(command, cwd=config.rootpath, capture_output=True, check=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return frozenset()
    return frozenset(found.stdout.split("\0")) - {""}


def pytest_sessionstart(session: pytest.Session) -> None:
    """Note what is there; workers of xdist leave it to the process that started them."""
    if not hasattr(session.config, "workerinput"):
        session.config.stash[BEFORE] = untracked(session.config)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail when there is more."""
    before = session.config.stash.get(BEFORE, None)
    left = [] if before is None else sorted(untracked(session.config) - before)
    if left:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:
            reporter.ensure_newline()
            reporter.write_line(f"The tests left files in the repository: {', '.join(left)}", red=True)
