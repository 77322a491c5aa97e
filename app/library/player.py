"""Play a video from a time on, in whatever player this machine has."""

from __future__ import annotations

import shutil
import subprocess
import sys

from encoder.errors import ConfigError

# Players that can begin anywhere: arguments, with {start} in seconds.
PLAYERS = {
    "mpv": ["--start={start}"],
    "vlc": ["--start-time={start}"],
    "ffplay": ["-ss", "{start}", "-autoexit"],
}
OPENERS = {"darwin": "open", "linux": "xdg-open"}  # play from the beginning


def play(path: str, start_s: float) -> None:
    """Returns when the player has ended, or has been left to itself. Raises ConfigError without a player."""
    for name, options in PLAYERS.items():
        if program := shutil.which(name):
            start = f"{start_s:.2f}"
            subprocess.call([program, *(option.format(start=start) for option in options), path])
            return
    opener = shutil.which(OPENERS.get(sys.platform, ""))
    if opener is None:
        raise ConfigError(f"No player is here for {path!r}: install mpv, vlc or ffplay.")
    if subprocess.call([opener, path], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL):
        raise ConfigError(f"Nothing here opens {path!r}: install mpv, vlc or ffplay.")
