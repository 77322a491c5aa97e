"""FluxChat as a model of lmms-eval, the field's own evaluation harness.

    pip install 'fluxchat[eval]'
    lmms-eval --model fluxchat --model_args budget=1024 --tasks mvbench --batch_size 1 --output_path results

The package registers itself by an entry point in pyproject.toml. Model arguments: model (folder of
a saved model, or a stock video model by folder or hub id; default: the one that ships), llm, encoder, device,
dtype, quantize, select, plan, budget, selector, system.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmms_eval.api.model import lmms

from encoder.errors import ConfigError

MAX_PICTURES = 8  # a longer list of pictures is the frames of one video


def manifest() -> Any:
    """The entry point of the plugin: the model's name and the path of its class."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="fluxchat", simple_class_path=f"{__name__}.FluxChat")


class FluxChat(lmms):
    """Answers the harness's requests with one VideoChat per process, each on its own GPU.

    Raises ModelError or ConfigError for what cannot be loaded.
    """

    is_simple = True

    def __init__(
        self,
        model: str | None = None,
        llm: str | None = None,
        encoder: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        quantize: str | None = None,
        select: str | None = None,
        plan: str | None = None,
        budget: int | str | None = None,
        selector: str = "flux",
        system: str | None = None,
        batch_size: int | str = 1,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise ConfigError(f"--model_args has the unknown setting {sorted(unknown)[0]!r}.")
        if str(batch_size) != "1":
            raise ConfigError("FluxChat answers one question at a time here: use --batch_size 1.")
        import os

        import torch

        from app.chat import VideoChat

        self._rank, self._world_size = (
            int(os.environ.get("RANK", "0")),
            int(os.environ.get("WORLD_SIZE", "1")),
        )
        if self._world_size > 1:
            # The harness gathers through this; it also joins the processes.
            from accelerate import Accelerator

            self.accelerator = Accelerator(cpu=not torch.accelerator.is_available())
            if torch.cuda.is_available():
                device = f"cuda:{self.accelerator.local_process_index}"
        self.chat = VideoChat(
            model,
            llm=llm,
            encoder=encoder,
            device=device,
            dtype=dtype,
            quantize=quantize,  # type: ignore[arg-type]
            select=select,  # type: ignore[arg-type]
            plan=plan,
        )
        self._options = {"budget": budget, "selector": selector, "system": system}

    @property
    def device(self) -> Any:
        """Where the encoder runs; the harness gathers results there."""
        return self.chat.device

    @property
    def rank(self) -> int:
        """Number of this process."""
        return self._rank

    @property
    def world_size(self) -> int:
        """Processes that share the requests."""
        return self._world_size

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Greedy (or sampled, as the task says) answers, cut at the task's stop words."""
        from tqdm.auto import tqdm

        answers = []
        for request in tqdm(requests, desc="fluxchat", disable=self._rank != 0):
            context, generation, to_visual, number, task, split = request.args
            document = self.task_dict[task][split][number]
            videos = as_videos([visual for visual in to_visual(document) or () if visual is not None])
            options = {**self._options, **sampling(generation)}
            answer = self.chat.ask(videos, context, hedge=False, **options).text
            answers.append(cut(answer, generation.get("until") or ()))
            self.cache_hook.add_partial("generate_until", (context, generation), answers[-1])
        return answers

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        """Not offered: no task of this model's needs it."""
        raise NotImplementedError("fluxchat answers single questions: choose a task without rounds.")

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Not offered: multiple choice is answered in words here."""
        raise NotImplementedError("fluxchat generates answers: choose a task of type generate_until.")


def as_videos(visuals: Sequence[Any]) -> Any:
    """The media for VideoChat: each path is a video or picture, a long list of pictures is one video."""
    from app.chat import Videos

    pictures = [visual for visual in visuals if not isinstance(visual, str)]
    if len(pictures) == len(visuals) > MAX_PICTURES:
        return Videos([list(visuals)])
    return Videos(visuals)


def sampling(generation: dict[str, Any]) -> dict[str, Any]:
    """A task's generation settings as VideoChat's; what it does not know (beams) stays at its default."""
    chosen: dict[str, Any] = {"max_new_tokens": int(generation.get("max_new_tokens") or 128)}
    temperature = float(generation.get("temperature") or 0.0)
    if generation.get("do_sample", temperature > 0) and temperature > 0:
        chosen |= {"temperature": temperature, "seed": 0}
        for name, kind in (("top_p", float), ("top_k", int), ("min_p", float)):
            if generation.get(name):
                chosen[name] = kind(generation[name])
    if generation.get("repetition_penalty"):
        chosen["repetition_penalty"] = float(generation["repetition_penalty"])
    return chosen


def cut(answer: str, until: str | Sequence[str]) -> str:
    """The answer before the first of the stop words."""
    for word in [until] if isinstance(until, str) else until:
        if word:
            answer = answer.partition(word)[0]
    return answer.strip()
