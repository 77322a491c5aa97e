"""BudgetInput: each clip shown as `VideoChat` would show it for a number of tokens."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any

from encoder.budget import Budget, Plan, input_for
from encoder.selection import Selector
from encoder.video.reader import Clip, VideoInfo
from llm_bridge.towers.tower import Tower
from training.data.media import FileMedia, Media, ShardMedia


@dataclass(frozen=True)
class BudgetInput:
    """What `keep` tokens buy of each clip by the tower's plan table or rule: frames, size, and K at most."""

    keep: int
    selector: Selector = "flux"

    def __str__(self) -> str:
        return f"budget:{self.keep}{'' if self.selector == 'flux' else f'/{self.selector}'}"

    def to_dict(self) -> dict[str, Any]:
        """For result files; frames and resolution differ from clip to clip."""
        return {"frames": None, "resolution": None, "K": self.keep, "selector": self.selector}

    def open(self, media: Media, tower: Tower) -> tuple[Clip, Plan]:
        """The clip and its plan; raises VideoError.

        It is opened at the input of a long video, and again where what it is buys another.
        """
        space, table = tower.space, tower.plan_table
        frames, side = input_for(self.keep, sys.maxsize, space, table)
        clip = media.load(frames, side)
        plan = Budget(self.keep).plan(shown_info(clip.info, media), space, table=table)
        wanted = plan.frames, max(plan.height, plan.width)
        if wanted != (frames, side):
            clip = media.load(*wanted)
        return clip, plan


def shown_info(info: VideoInfo, media: Media) -> VideoInfo:
    """The info of the part of a file that a medium shows, as if it were a video of its own."""
    if not isinstance(media, (FileMedia, ShardMedia)) or info.kind != "video" or not info.duration_s:
        return info
    end_s = min(media.end_s or info.duration_s, info.duration_s)
    duration_s = max(0.0, end_s - (media.start_s or 0.0))
    share = duration_s / info.duration_s
    frames = None if info.frames is None else max(1, round(info.frames * share))
    return replace(info, duration_s=duration_s, frames=frames)
