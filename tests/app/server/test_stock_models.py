"""The API on a stock video model of each kind: media of both kinds in any order, streamed or not."""

from __future__ import annotations

import base64
from pathlib import Path

import httpx
import pytest
from PIL import Image

from app.chat import VideoChat
from tests import tiny_video_models
from tests.app.conftest import WORLD
from tests.app.server.serving import running
from tests.tiny_video_models import ONE_QUICK


def part(path: Path) -> dict[str, object]:
    kind, mime = ("video", "video/mp4") if path.suffix == ".mp4" else ("image", "image/png")
    url = f"data:{mime};base64,{base64.b64encode(path.read_bytes()).decode()}"
    return {"type": f"{kind}_url", f"{kind}_url": {"url": url}}


@pytest.mark.parametrize("kind", ONE_QUICK)
def test_media_in_any_order(kind: str, tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    Image.new("RGB", (300, 200), (200, 30, 30)).save(picture)
    folder = tiny_video_models.make(tmp_path / kind, kind)
    text = {"type": "text", "text": "What?"}
    video, image = part(WORLD), part(picture)
    with (
        VideoChat(folder, device="cpu", trusted=False) as chat,
        running(chat) as (address, _),
        httpx.Client(base_url=address) as client,
    ):
        for content in ([video, text], [image, text], [video, image, text], [text, image, video]):
            request = {
                "model": "fluxchat",
                "messages": [{"role": "user", "content": content}],
                "max_tokens": 3,
                "token_budget": 20,
            }
            whole = client.post("/v1/chat/completions", json=request)
            assert whole.status_code == 200, whole.text
            streamed = client.post("/v1/chat/completions", json={**request, "stream": True})
            assert streamed.status_code == 200
            assert streamed.text.rstrip().endswith("data: [DONE]")
            assert '"error"' not in streamed.text
        refused = client.post("/v1/chat/completions", json={**request, "token_budget": 0})
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "token_budget"
