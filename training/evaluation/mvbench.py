"""MVBench: 20 tasks of 200 multiple-choice questions, in both published prompt forms.

"flash" is VideoChat-Flash's (the lmms-eval task), "videochat2" that of the benchmark's own notebook. A video
that cannot be found or read is listed and never guessed; answers without any text are left out of a task's
share, as in the published code, and counted. The synthetic world's questions come in the same layout.

"open" shows no options: the model answers in a word or phrase (LLaVA-1.5's request for one), and the answer
counts as the option that `option_meant` finds in it. That is stricter than a judge who knows synonyms, and
the same for every budget and selector; it shows what multiple choice hides.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

from encoder.errors import DataError, VideoError
from encoder.video.frame_times import middle_times, shown_at
from encoder.video.reader import Clip, read_clip
from training.command_line import table
from training.data.media import IMAGES, FileMedia, Media, WorldMedia
from training.data.synthetic_source import WorldSource
from training.evaluation.answer_scoring import option_in, option_meant
from training.evaluation.benchmarks import find_video
from training.evaluation.chat_evaluator import ChatEvaluator, Query
from training.evaluation.journal import Journal, Row, run_blocks
from training.evaluation.metrics import mean_interval, wilson

Form = Literal["flash", "videochat2", "words", "open"]
FORMS: tuple[Form, ...] = get_args(Form)
FRAME_FOLDERS_FPS = 3.0
SYSTEM = (
    "Carefully watch the video and pay attention to the cause and sequence of events, the detail and "
    "movement of objects, and the action and pose of persons. Based on your observations, select the best "
    "option that accurately addresses the question."
)


@dataclass(frozen=True)
class Task:
    """folders: where its videos lie, tried in order; bounded: whether start and end of a question count.

    The last folder may hold videos that are cut already: those are then taken whole.
    """

    folders: tuple[str, ...]
    cut: str | None = None
    bounded: bool = False


_CHARADES = Task(("star/Charades_v1_480",), "star/Charades_segment", True)
_CLEVRER, _PERCEPTION = Task(("clevrer/video_validation",)), Task(("perception/videos",))
TASKS: Mapping[str, Task] = {
    "action_sequence": _CHARADES,
    "action_prediction": _CHARADES,
    "action_antonym": Task(("ssv2_video", "ssv2_video_mp4")),
    "fine_grained_action": Task(("Moments_in_Time_Raw/videos",)),
    "unexpected_action": Task(("FunQA_test/test",)),
    "object_existence": _CLEVRER,
    "object_interaction": _CHARADES,
    "object_shuffle": _PERCEPTION,
    "moving_direction": _CLEVRER,
    "action_localization": Task(("sta/sta_video",), "sta/sta_video_segment", True),
    "scene_transition": Task(("scene_qa/video",)),
    "action_count": _PERCEPTION,
    "moving_count": _CLEVRER,
    "moving_attribute": _CLEVRER,
    "state_change": _PERCEPTION,
    "fine_grained_pose": Task(("nturgbd", "nturgbd_convert")),
    "character_order": _PERCEPTION,
    "egocentric_navigation": Task(("vlnqa",)),
    "episodic_reasoning": Task(
        ("tvqa/frames_fps3_hq", "tvqa/frames_fps3"), "tvqa/video_fps3_hq_segment", True
    ),
    "counterfactual_inference": _CLEVRER,
}


# Tasks of the synthetic world that MVBench has under another name, and the options that its letters reach.
AS_IN_MVBENCH: Mapping[str, str] = {"localisation_part": "action_localization"}
MOST_OPTIONS = 5


@dataclass(frozen=True)
class Item:
    """One question. truth: number of the right candidate."""

    id: str
    task: str
    media: Media
    question: str
    candidates: tuple[str, ...]
    truth: int


@dataclass(frozen=True)
class FrameFolder:
    """A video kept as pictures, numbered in order, 3 per second."""

    folder: Path
    start_s: float | None = None
    end_s: float | None = None
    fps: float = FRAME_FOLDERS_FPS

    @property
    def key(self) -> str:
        """Folder and time span."""
        return f"{self.folder}|{self.start_s}|{self.end_s}"

    def load(self, frames: int, resolution: int, *, moments: Sequence[float] | None = None) -> Clip:
        """The pictures on screen at the middles of equal parts of the span; moments are not used here."""
        from PIL import Image

        paths = sorted(path for path in self.folder.glob("*") if path.suffix.lower() in IMAGES)
        if not paths:
            raise VideoError(f"Cannot read {self.folder.name!r}: the folder holds no pictures.")
        duration = len(paths) / self.fps
        start, end = self.start_s or 0.0, min(self.end_s or duration, duration)
        if start >= end:
            raise VideoError(f"Cannot read {self.folder.name!r}: it ends before {start:g} s.")
        chosen = shown_at([i / self.fps for i in range(len(paths))], middle_times(start, end, frames))
        try:
            pictures = [Image.open(paths[i]).convert("RGB") for i in chosen]
        except OSError as error:
            raise VideoError(f"Cannot read a picture of {self.folder.name!r}: {error}.") from error
        # One picture per second, so that each of the chosen ones is what is shown in its second.
        clip = read_clip(pictures, len(pictures), max_side=4 * resolution)
        step = (end - start) / frames
        return Clip(clip.frames, tuple(start + (i + 0.5) * step for i in range(len(chosen))), clip.info)


def read_mvbench(annotations: Path, videos: Path, tasks: Sequence[str] | None = None) -> list[Item]:
    """All questions of a folder of `TASK.json` files, in the benchmark's order of tasks.

    tasks: only these. Raises DataError for a missing file or a question without exactly one right candidate.
    """
    wanted = list(tasks or TASKS)
    if unknown := [name for name in wanted if name not in TASKS]:
        raise DataError(f"MVBench has no task {unknown[0]!r}: its tasks are {', '.join(TASKS)}.")
    items: list[Item] = []
    for name in wanted:
        path = annotations / f"{name}.json"
        try:
            rows = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise DataError(f"Cannot read the task {path}: {error}.") from error
        for number, row in enumerate(rows):
            items.append(_item(name, number, row, videos, path))
    return items


def _item(name: str, number: int, row: Any, videos: Path, path: Path) -> Item:
    try:
        candidates = tuple(str(candidate) for candidate in row["candidates"])
        truth = candidates.index(str(row["answer"]))
        media = locate(TASKS[name], videos, str(row["video"]), row.get("start"), row.get("end"))
        return Item(f"{name}/{number}", name, media, str(row["question"]), candidates, truth)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}, question {number} is not in MVBench's layout: {error!r}.") from error


def locate(task: Task, videos: Path, name: str, start_s: float | None, end_s: float | None) -> Media:
    """The media of a question; when there is no such file, the one that will be reported missing."""
    span = (start_s, end_s) if task.bounded else (None, None)
    for folder in task.folders:
        if (videos / folder / name).is_dir():
            return FrameFolder(videos / folder / name, *span)
        if (path := find_video(videos / folder, name)).exists():
            return FileMedia((path,), *span)
    if task.cut is not None and (path := find_video(videos / task.cut, name)).exists():
        return FileMedia((path,))
    return FileMedia((find_video(videos / task.folders[0], name),), *span)


def world_items(source: WorldSource) -> list[Item]:
    """The synthetic world's multiple-choice questions as such items.

    Task names are MVBench's where it has the task. Questions with more options than the published readers of
    letters know are left out.
    """
    world = source.open()
    items = []
    for number in range(source.first, source.first + source.count):
        sample = world.sample(number)
        media = WorldMedia(world, sample, number)
        for place, question in enumerate(q for q in sample.questions if 0 < len(q.options) <= MOST_OPTIONS):
            task = AS_IN_MVBENCH.get(question.task, question.task)
            # The world asks in a form of its own; the bare question is its first line.
            text = question.question.partition("\n")[0].removeprefix("Question: ")
            truth = question.answer_index or 0
            items.append(Item(f"{task}/{number}.{place}", task, media, text, question.options, truth))
    return items


def by_video(items: Sequence[Item]) -> list[range]:
    """Numbers of neighbouring items about the same media: their questions are answered together."""
    starts = [n for n, item in enumerate(items) if not n or item.media.key != items[n - 1].media.key]
    return [range(start, end) for start, end in pairwise([*starts, len(items)])]


def ask(item: Item, form: Form) -> Query:
    """The question as it is put to the model."""
    if form == "open":
        text = f"{item.question}\nAnswer the question using a single word or phrase."
        return Query(text, max_new_tokens=32)
    options = "".join(f"({chr(65 + i)}) {candidate}\n" for i, candidate in enumerate(item.candidates))
    if form != "videochat2":
        text = f"Question: {item.question}\nOption:\n{options}Only give the best option."
        return Query(text, max_new_tokens=16)
    text = f"Question: {item.question}\nOptions:\n{options}\nOnly give the best option."
    return Query(text, system=SYSTEM, prefix="Best option:(", max_new_tokens=16)


def letter_by_words(text: str, candidates: Sequence[str]) -> str | None:
    """The letter of the option that an answer chooses, by its letter or its words."""
    number = option_in(text, candidates)
    return None if number is None else chr(65 + number)


def letter_meant(text: str, candidates: Sequence[str]) -> str | None:
    """The letter of the option that an open answer means."""
    number = option_meant(text, candidates)
    return None if number is None else chr(65 + number)


_REMOVED = ';/[]"{}()=+\\_->@<`,?!'


def letter_flash(text: str) -> str | None:
    """The option letter by the rule of the lmms-eval task that VideoChat-Flash uses: "C. ..." at the start,
    else the first letter from A to E that stands alone once punctuation is gone, in either case.

    So "a dog" answers A; that is the published rule.
    """
    stripped = text.strip()
    if match := re.match(r"([A-Ea-e])\.\s*\S", stripped):
        return match.group(1).upper()
    cleaned = stripped.translate(str.maketrans(_REMOVED + "\n\t", " " * (len(_REMOVED) + 2)))
    cleaned = re.sub(r"\.(?!\d)", "", cleaned).strip(" '")
    match = re.search(r"\b([A-Ea-e])\b", cleaned)
    return match.group(1).upper() if match else None


def letter_videochat2(text: str) -> str | None:
    """The option letter of a completion of "Best option:(": the letter it begins with."""
    match = re.match(r"\s*\(?\s*([A-Ea-e])\b", text)
    return match.group(1).upper() if match else None


@dataclass(frozen=True)
class TaskScore:
    """One task of MVBench. empty: answers without any text, which the published share leaves out."""

    right: int
    answered: int
    empty: int

    @property
    def percent(self) -> float | None:
        """100 * right / answered, None when nothing was."""
        return 100 * self.right / self.answered if self.answered else None


def mvbench_scores(rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, TaskScore], float | None]:
    """Scores by task of rows {task, answer, letter, truth}, and the mean over tasks with answers."""
    tasks: dict[str, TaskScore] = {}
    for row in rows:
        old = tasks.get(row["task"], TaskScore(0, 0, 0))
        empty = not row["answer"].strip()
        right = not empty and row["letter"] == row["truth"]
        tasks[row["task"]] = TaskScore(old.right + right, old.answered + (not empty), old.empty + empty)
    percents = [score.percent for score in tasks.values() if score.percent is not None]
    return tasks, sum(percents) / len(percents) if percents else None


LETTERS: Mapping[Form, Callable[[str, Sequence[str]], str | None]] = {
    "flash": lambda text, _: letter_flash(text),
    "videochat2": lambda text, _: letter_videochat2(text),
    "words": letter_by_words,
    "open": letter_meant,
}


def evaluate_mvbench(
    evaluator: ChatEvaluator, items: Sequence[Item], form: Form, journal: Journal
) -> dict[str, Any]:
    """Score by task and their mean, with the missing videos."""

    def work(numbers: Sequence[int]) -> list[Row]:
        questions = [ask(items[number], form) for number in numbers]
        try:
            answers = list(evaluator.answers(items[numbers[0]].media, numbers[0], questions))
        except VideoError as error:
            return [{"missing": str(error)} for _ in numbers]
        return [{"answer": answer} for answer in answers]

    label = f"{evaluator.key}|{form}"
    rows = run_blocks(
        [f"{label}|{item.id}" for item in items], work, journal, block=by_video(items), label=label
    )
    return score_mvbench(items, rows, form)


def score_mvbench(items: Sequence[Item], rows: Sequence[Row], form: Form) -> dict[str, Any]:
    """Figures of rows {"answer"} or {"missing"} in the order of the items; tasks in MVBench's order."""
    answered = [
        {
            "task": item.task,
            "answer": row["answer"],
            "letter": LETTERS[form](row["answer"], item.candidates),
            "truth": chr(65 + item.truth),
        }
        for item, row in zip(items, rows, strict=True)
        if "missing" not in row
    ]
    scores, mean = mvbench_scores(answered)
    missing = {i.id: row["missing"] for i, row in zip(items, rows, strict=True) if "missing" in row}
    order = [*TASKS, *(item.task for item in items)]
    tasks = {
        task: _task_row([item for item in items if item.task == task], scores.get(task), missing, form)
        for task in sorted({item.task for item in items}, key=order.index)
    }
    answered_tasks = [score for score in scores.values() if score.answered]
    low, high = (
        mean_interval([(score.right, score.answered) for score in answered_tasks])
        if answered_tasks
        else (0.0, 1.0)
    )
    chances = [row["chance"] for row in tasks.values() if "chance" in row]
    return {
        "prompt": form,
        "tasks": tasks,
        "mean": mean,
        "low": round(100 * low, 2),
        "high": round(100 * high, 2),
        "complete": not missing and mean is not None,
        **({"chance": sum(chances) / len(chances)} if chances else {}),
        "unreadable letters": sum(row["letter"] is None and bool(row["answer"].strip()) for row in answered),
        "missing": missing,
    }


def _task_row(
    items: Sequence[Item], score: TaskScore | None, missing: Mapping[str, str], form: Form
) -> dict[str, Any]:
    """One task's share in percent with its interval; score: None when no video of it could be read.

    There is no chance of an open answer: whoever is not shown the options cannot guess among them.
    """
    low, high = wilson(score.right, score.answered) if score else (0.0, 1.0)
    chance = 100 * sum(1 / len(item.candidates) for item in items) / len(items)
    return {
        "percent": None if score is None else score.percent,
        "low": round(100 * low, 2),
        "high": round(100 * high, 2),
        **({} if form == "open" else {"chance": chance}),
        "answered": score.answered if score else 0,
        "empty": score.empty if score else 0,
        "missing": sum(item.id in missing for item in items),
        "questions": len(items),
    }


def mvbench_table(results: Mapping[str, dict[str, Any]]) -> str:
    """Tasks down, runs across, in percent with intervals; the mean over tasks last, and what is MVBench's.

    A column says what guessing gives, where a run was shown the options.
    """

    def cell(value: float | None, row: Mapping[str, Any]) -> str | None:
        return None if value is None else f"{value:.1f} [{row['low']:.0f}, {row['high']:.0f}]"

    runs, first = list(results), next(iter(results.values()))
    chooses = next((run for run in results.values() if run["prompt"] != "open"), None)

    def chance(task: str | None) -> list[str]:
        if chooses is None:
            return []
        return [f"{(chooses if task is None else chooses['tasks'][task])['chance']:.0f}"]

    lines: list[list[object]] = []
    for task, row in first["tasks"].items():
        of_task = [results[run]["tasks"][task] for run in runs]
        shares = (cell(own["percent"], own) for own in of_task)
        lines.append([task, *shares, *chance(task), str(row["questions"])])
    questions = sum(row["questions"] for row in first["tasks"].values())
    means = (cell(results[run]["mean"], results[run]) for run in runs)
    lines.append(["mean over tasks", *means, *chance(None), str(questions)])
    empty = [""] * (1 if chooses is None else 2)
    for name, count in (("no letter", "unreadable letters"), ("missing", "missing")):
        totals = [results[run][count] for run in runs]
        lines.append([name, *(str(n if isinstance(n, int) else len(n)) for n in totals), *empty])
    common = sum(task in TASKS for task in first["tasks"])
    note = f"{common} of MVBench's {len(TASKS)} tasks, {len(first['tasks']) - common} others."
    columns = ["task", *runs, *([] if chooses is None else ["chance"]), "n"]
    return f"{table(columns, lines)}\n{note}"
