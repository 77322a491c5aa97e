"""Clips that are encoded in one call: which ones, with which results, and what a failure takes along."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from encoder.budget import Plan
from encoder.errors import ConfigError, ModelError
from encoder.selection import Selector
from encoder.video.reader import Clip, VideoInfo
from llm_bridge.compute_thread import ComputeThread
from llm_bridge.model import VideoLanguageModel
from llm_bridge.towers.encoding_queue import EncodingQueue
from llm_bridge.towers.flux import FluxTower
from llm_bridge.towers.tower import Looked

PLAN = Plan(4, 28, 28, keep=6)


class Watched(FluxTower):
    """A tower that notes how many clips each call has. breaks: times of a clip with which a call fails."""

    def __init__(self, model: VideoLanguageModel) -> None:
        super().__init__(model)
        self.calls: list[int] = []
        self.breaks: tuple[float, ...] | None = None

    def look_together(
        self,
        pixels: Sequence[Tensor],
        plan: Plan,
        selector: Selector,
        times_s: Sequence[Sequence[float]],
    ) -> list[Looked]:
        self.calls.append(len(pixels))
        if self.breaks in times_s:
            raise RuntimeError("cannot")
        return super().look_together(pixels, plan, selector, times_s)


@pytest.fixture
def tower(model: VideoLanguageModel) -> Watched:
    return Watched(model)


@pytest.fixture
def thread() -> Iterator[ComputeThread]:
    made = ComputeThread()
    yield made
    made.close()


def clip(number: int, frames: int = 4) -> Clip:
    pixels = torch.randint(256, (frames, 40, 40, 3), generator=torch.Generator().manual_seed(number))
    info = VideoInfo("video", 40, 40, 4.0, frames, "h264", "mp4", 0, str(number))
    return Clip(pixels.to(torch.uint8), tuple(number + float(i) for i in range(frames)), info)


def looked_at_once(
    queue: EncodingQueue, thread: ComputeThread, asked: Sequence[tuple[Clip, Plan, Selector]]
) -> list[Future[Any]]:
    """All clips wait, in their order, before the first is encoded."""
    begin = threading.Event()
    thread.submit(begin.wait)
    with ThreadPoolExecutor(len(asked)) as pool:
        found = []
        for count, one in enumerate(asked, 1):
            found.append(pool.submit(queue.look, *one))
            while len(queue._waiting) < count:
                threading.Event().wait(0.001)
        begin.set()
    return found


def test_clips_of_one_shape_share_a_call_and_are_seen_as_alone(tower: Watched, thread: ComputeThread) -> None:
    queue = EncodingQueue(tower, thread, together=3)
    other = Plan(4, 28, 28, keep=9)
    asked: list[tuple[Clip, Plan, Selector]] = [(clip(number), PLAN, "flux") for number in range(5)]
    asked.insert(1, (clip(7), other, "flux"))
    asked.insert(2, (clip(8), PLAN, "uniform"))
    found = [future.result()[0] for future in looked_at_once(queue, thread, asked)]
    assert tower.calls == [3, 1, 1, 2]
    for (one, plan, selector), looked in zip(asked, found, strict=True):
        alone = tower.look(tower.pixels(one, plan), plan, selector, one.times_s)
        assert torch.equal(looked.kept, alone.kept)
        torch.testing.assert_close(looked.embedding, alone.embedding, rtol=1e-4, atol=1e-5)


def test_cells_that_are_drawn_are_those_drawn_alone(tower: Watched, thread: ComputeThread) -> None:
    queue = EncodingQueue(tower, thread, together=4)
    found = looked_at_once(queue, thread, [(clip(number), PLAN, "random") for number in range(4)])
    alone = tower.look(tower.pixels(clip(0), PLAN), PLAN, "random").kept
    assert all(torch.equal(future.result()[0].kept, alone) for future in found)


def test_on_cpus_each_has_its_own_call_and_its_own_bits(tower: Watched, thread: ComputeThread) -> None:
    queue = EncodingQueue(tower, thread)
    clips = [clip(number) for number in range(4)]
    found = looked_at_once(queue, thread, [(one, PLAN, "flux") for one in clips])
    assert tower.calls == [1, 1, 1, 1]
    for one, future in zip(clips, found, strict=True):
        alone = tower.look(tower.pixels(one, PLAN), PLAN, "flux", one.times_s)
        assert torch.equal(future.result()[0].embedding, alone.embedding)


def test_who_fails_fails_alone(tower: Watched, thread: ComputeThread) -> None:
    queue, tower.breaks = EncodingQueue(tower, thread, together=3), clip(1).times_s
    found = looked_at_once(queue, thread, [(clip(number), PLAN, "flux") for number in range(3)])
    assert tower.calls == [3, 1, 1, 1]
    with pytest.raises(RuntimeError, match="cannot"):
        found[1].result()
    assert all(len(found[index].result()[0].embedding) == 6 for index in (0, 2))


def test_a_bound_holds_pixels_back(
    tower: Watched, thread: ComputeThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue, held = EncodingQueue(tower, thread, in_flight=2), list[int]()
    pixels: Callable[[Clip, Plan], Tensor] = tower.pixels

    def noted(one: Clip, plan: Plan) -> Tensor:
        held.append(len(queue._waiting))
        return pixels(one, plan)

    monkeypatch.setattr(tower, "pixels", noted)
    begin = threading.Event()
    thread.submit(begin.wait)
    with ThreadPoolExecutor(5) as pool:
        found = [pool.submit(queue.look, clip(number), PLAN, "flux") for number in range(5)]
        while len(queue._waiting) < 2:
            threading.Event().wait(0.001)
        threading.Event().wait(0.1)
        assert len(held) == 2
        begin.set()
    assert [len(future.result()[0].embedding) for future in found] == [6] * 5


def test_a_closed_model_encodes_nothing(tower: Watched, thread: ComputeThread) -> None:
    queue = EncodingQueue(tower, thread)
    thread.close()
    with pytest.raises(ModelError, match="was closed"):
        queue.look(clip(0), PLAN, "flux")
    assert not queue._waiting


@pytest.mark.parametrize("together", [0, -1, 1.5])
def test_a_wrong_number_is_one_sentence(tower: Watched, thread: ComputeThread, together: Any) -> None:
    with pytest.raises(ConfigError, match="encode_batch must be a whole number from 1 up"):
        EncodingQueue(tower, thread, together)
