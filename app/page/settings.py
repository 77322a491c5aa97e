"""The page's controls as one value, and the range of its budget slider."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from app.estimate import QUESTION_TOKENS
from encoder.budget import Budget
from encoder.cost import MIB
from encoder.errors import BudgetError, ConfigError
from encoder.selection import Selector
from llm_bridge.chat_model import ChatModel
from llm_bridge.model_files.checks import free_memory

ANSWER_TOKENS = 128
CHOOSE = "by budget"


@dataclass(frozen=True)
class Settings:
    """Values of the controls, in the order of `Controls.settings`."""

    tokens: int
    auto: bool
    seconds: float
    selector: Selector
    frames: str
    resolution: str
    system: str = ""
    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = ANSWER_TOKENS
    think: bool = False

    @property
    def budget(self) -> Budget:
        """The budget with its overrides; raises BudgetError."""
        try:
            frames = None if self.frames == CHOOSE else int(self.frames)
            resolution = None if self.resolution == CHOOSE else int(self.resolution)
            if self.auto:
                return Budget(None, float(self.seconds), frames, resolution)
            return Budget(int(self.tokens), None, frames, resolution)
        except (TypeError, ValueError, OverflowError) as error:
            raise BudgetError("A budget's tokens, seconds, frames and resolution must be numbers.") from error

    def options(self) -> dict[str, Any]:
        """Arguments of `VideoChat.stream`; raises BudgetError or ConfigError."""
        try:
            return {
                "budget": self.budget,
                "selector": self.selector,
                "system": self.system.strip() or None,
                "temperature": float(self.temperature),
                "top_p": float(self.top_p),
                "max_new_tokens": int(self.max_new_tokens),
                "think": bool(self.think),
            }
        except (TypeError, ValueError, OverflowError, AttributeError) as error:
            raise ConfigError(
                "temperature, top_p and max_new_tokens must be numbers, and the system prompt a text."
            ) from error


@dataclass(frozen=True)
class Range:
    """The range of the token budget slider."""

    step: int
    largest: int

    @staticmethod
    def of(model: ChatModel) -> Range:
        """Steps of 64 up to everything the model was trained on, less where context or memory end earlier.

        Small grids get finer steps, so that there are at least about 30 of them.
        """
        tower = model.tower
        frames, side = tower.space.full
        seen = tower.space.tokens(frames, side)
        step = max(8, min(64, 1 << (seen // 32).bit_length() - 1))
        context, free = model.llm.context_length, free_memory(model.tower.device) / MIB

        def fits(tokens: int) -> bool:
            plan = tower.space.square(frames, side, tokens)
            positions = tower.prompt_tokens(plan) + QUESTION_TOKENS + ANSWER_TOKENS
            kv_mib = positions * model.llm.kv_bytes_per_token / MIB
            working = tower.mib(plan)
            return (context is None or positions <= context) and working + kv_mib <= free / 2

        largest = next((n for n in range(seen // step * step, step, -step) if fits(n)), step)
        return Range(step, largest)

    def presets(self, default: int) -> list[tuple[str, int]]:
        """Three places of the slider under plain names: about a quarter of the middle one, it, and all."""
        middle = self.near(min(default, self.largest // 2))
        return [("Fast", self.near(middle // 4)), ("Balanced", middle), ("Thorough", self.largest)]

    def near(self, tokens: int) -> int:
        """The closest position of the slider."""
        return min(self.largest, max(self.step, round(tokens / self.step) * self.step))
