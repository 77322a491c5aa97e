"""Chat templates are programs that came with a model: one that does not end, or fills the memory, is refused.

Jinja's sandbox keeps them from the machine but bounds neither their time nor their memory. So a template that
does more than walk through the messages is tried on some conversations first, in a process with limits.
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from typing import Any

from encoder.errors import ModelError

LONGEST = 2**20  # characters of a template
SECONDS, MIB = 5, 1024
# Without these a template writes a bounded number of pieces for every message.
_MORE_THAN_PIECES = re.compile(
    r"range|lipsum|macro|recursive|namespace|cycler|joiner|dict|include|import|call|set\b|\*|[^{]%[^}]|"
    r"center|format|indent|wrap|replace|batch|slice|just|zfill|join|tabs|for.*for.*for.*for",
    re.DOTALL,
)
_PROBE = """
import json, sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, (%(seconds)d, %(seconds)d + 1))
    resource.setrlimit(resource.RLIMIT_AS, (%(mib)d << 20, %(mib)d << 20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
except (ImportError, ValueError, OSError):
    pass
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
def refuse(message):
    raise ValueError(message)
request = json.load(sys.stdin)
environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
environment.filters["tojson"] = lambda x, **options: json.dumps(x, ensure_ascii=False)
environment.globals.update(raise_exception=refuse, strftime_now=lambda form: form)
for messages in request["conversations"]:
    size = 0
    try:
        for piece in environment.from_string(request["template"]).generate(
            messages=messages, add_generation_prompt=True, **request["specials"]
        ):
            size += len(piece)
            if size > %(longest)d:
                raise MemoryError
    except MemoryError:
        sys.exit(3)
    except Exception:  # a refusal of the template is reported when it is used
        pass
"""


def check_template(tokenizer: Any) -> None:
    """Raises ModelError for a tokenizer whose chat template does not end within limits."""
    templates = getattr(tokenizer, "chat_template", None) or ()
    specials = {
        name: str(value) for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)
    }
    for template in [templates] if isinstance(templates, str) else list(dict(templates).values()):
        if reason := _fault(str(template), tuple(sorted(specials.items()))):
            raise ModelError(
                f"The chat template of {tokenizer.name_or_path} {reason}: take the model's original."
            )


@functools.lru_cache(maxsize=64)
def _fault(template: str, specials: tuple[tuple[str, str], ...]) -> str | None:
    """What is wrong with a template, in a few words."""
    if len(template) > LONGEST:
        return f"has {len(template)} characters"
    if not _MORE_THAN_PIECES.search(template):
        return None
    turns = [{"role": role, "content": "A word. " * 8} for _ in range(12) for role in ("user", "assistant")]
    conversations = [
        turns[:1],
        [{"role": "system", "content": "Be brief."}, *turns[:1]],
        turns[:3],
        turns[:-1],
    ]
    script = _PROBE % {"seconds": SECONDS, "mib": MIB, "longest": 2**22}
    request = json.dumps({"template": template, "specials": dict(specials), "conversations": conversations})
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", script],
            input=request,
            capture_output=True,
            text=True,
            timeout=6 * SECONDS,
        )
    except subprocess.TimeoutExpired:
        return "does not end"
    except OSError:
        return None  # no process can be started here: it is tried when it is used
    if done.returncode == 3:
        return "fills the memory"
    return "does not end" if done.returncode < 0 else None
