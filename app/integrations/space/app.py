"""The Hugging Face Space: the page with the shipped model, public, as Spaces are.

    python app/integrations/space/app.py

In a Space this file is app.py, beside README.md and requirements.txt.

Settings of the Space that change it: FLUXCHAT_MODEL (a folder), FLUXCHAT_LLM (a hub id), FLUXCHAT_QUANTIZE
(4bit or 8bit), FLUXCHAT_AUTH (USER:PASSWORD).
"""

import os

from app.chat import VideoChat
from app.server.launch import serve
from app.server.options import WEB_LIMITS, LaunchOptions, parse_login
from app.server.routes import ServerSettings
from app.server.security.authentication import Credentials


def main() -> None:
    """Serve on the port that the Space is asked by."""
    model, llm = os.environ.get("FLUXCHAT_MODEL"), os.environ.get("FLUXCHAT_LLM")
    if model is None and llm is None:
        from llm_bridge.assets.fetch import fetch_default_llm

        fetch_default_llm()
    quantize = os.environ.get("FLUXCHAT_QUANTIZE")
    options = LaunchOptions(
        host=os.environ.get("GRADIO_SERVER_NAME", "0.0.0.0"),
        port=int(os.environ.get("GRADIO_SERVER_PORT", "7860")),
        credentials=Credentials(login=parse_login(os.environ.get("FLUXCHAT_AUTH"))),
        server=ServerSettings(slots=4, queue=16, upload_mib=100),
        public=True,  # the Space's own settings say who may come in
    )
    chat = VideoChat(
        model,
        llm=llm,
        quantize=quantize,  # type: ignore[arg-type]
        trusted=False,
        limits=WEB_LIMITS,
        batch=4,
    )
    with chat:
        serve(chat, options)


if __name__ == "__main__":
    main()
