"""What `mkdocs build` does beside docs/: texts of the repository become pages, and so does the API reference.

Links in all pages are written as they work in the repository. Here they are pointed at the pages; a link to a
file that is no page becomes its text, and one to nothing is left for `mkdocs build --strict` to refuse.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
TEXTS = (
    "app/pretrained/README.md",
    "training/RESULTS.md",
    "SECURITY.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
)
PICTURES = ("training/budget.png", "training/result_files/tokens/*.png")
# Pages of the reference: a room, and the modules whose public names are described.
ROOMS = {
    "app": (
        "app/answer.py",
        "app/conversation.py",
        "app/estimate.py",
        "app/messages.py",
        "app/streaming.py",
        "app/vision.py",
    ),
    "encoder": ("encoder/*.py", "encoder/video/reader.py"),
    "llm_bridge": ("llm_bridge/*.py",),
    "training": ("training/trainer/*.py",),
}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the repository's texts, pictures and the reference."""
    for pattern in (*TEXTS, *PICTURES):
        for path in sorted(ROOT.glob(pattern)):
            uri = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, uri, abs_src_path=str(path)))
    for room, patterns in ROOMS.items():
        paths = sorted(path for pattern in patterns for path in ROOT.glob(pattern))
        files.append(File.generated(config, f"reference/{room}.md", content=reference(room, paths)))
    return files


def reference(room: str, paths: list[Path]) -> str:
    """Markdown that asks mkdocstrings for each module."""
    text = [f"# {room}\n\nFrom the docstrings of the code.\n"]
    for path in paths:
        parts = path.relative_to(ROOT).with_suffix("").parts
        if not path.name.startswith("_"):
            text.append(f"::: {'.'.join(parts)}\n")
    return "\n".join(text)


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links at pages."""
    uri = page.file.src_uri
    in_docs = (ROOT / "docs" / uri).exists()
    folder = posixpath.dirname(f"docs/{uri}" if in_docs else uri)
    pages = {file.src_uri for file in files}

    def pointed(match: re.Match[str]) -> str:
        mark, text, link, anchor = match[1], match[2], match[3], match[4] or ""
        if ":" in link:
            return match[0]
        place = posixpath.normpath(posixpath.join(folder, link))
        target = place.removeprefix("docs/")
        if target in pages:
            return f"{mark}[{text}]({posixpath.relpath(target, posixpath.dirname(uri) or '.')}{anchor})"
        return text if (ROOT / place).exists() else match[0]

    return LINK.sub(pointed, without_front_matter(markdown))


def without_front_matter(markdown: str) -> str:
    """Hugging Face's model cards begin with YAML that is not for readers."""
    return re.sub(r"\A---\n.*?\n---\n", "", markdown, flags=re.DOTALL)
