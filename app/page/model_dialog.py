"""The list of models, and what is said while one is loaded, as HTML."""

from __future__ import annotations

from html import escape

from app.about import device_gib
from app.model_choices import SHIPPED_NAME, SHIPPED_TITLE, Choice
from app.model_slot import Loading, ModelSlot, gib
from app.page.html import copy_button
from llm_bridge.model_files.hub import free_disk
from llm_bridge.towers.catalog import CATALOG, StockEntry
from llm_bridge.towers.stock import kinds


def dialog(slot: ModelSlot, *, loads: bool) -> str:
    """The dialog with the model in use, those that can be had, and the buttons or commands that load them."""
    device, memory = device_gib()
    chat = slot.chat
    familiarity = chat.model.tower.familiarity
    good_for = (
        "Answers questions about real videos and images, and chats without one."
        if familiarity is None
        else f"Knows {familiarity.things} drawn things and how they move; it guesses about real videos."
    )
    choices = {choice.name: choice for choice in slot.choices()} if loads else {}
    rows = [_own(choice) for choice in choices.values() if choice.name != slot.name and choice.entry is None]
    if slot.offers_shipped and slot.name != SHIPPED_NAME and SHIPPED_NAME not in choices:
        rows.append(_shipped(fetched=not loads))
    catalog = [entry for entry in CATALOG if entry.kind in kinds() and entry.name != slot.name]
    rows += [_entry(entry, choices.get(entry.name), memory) for entry in catalog]
    how = (
        "The conversation goes on with the model that you load."
        if loads
        else "To load another, start the page again with its command."
    )
    return (
        '<dialog id="fluxchat-models" aria-labelledby="fluxchat-models-title">'
        '<h2 id="fluxchat-models-title">Models</h2>'
        f"<p><b>{escape(chat.name)}</b> is loaded, on {chat.device}. {good_for}</p>"
        f"<p>This machine: {escape(device)}, {memory:.0f} GiB. {how}</p><ul>{''.join(rows)}</ul>"
        '<button type="button" class="fc-close" data-models-close aria-label="Close">×</button></dialog>'
    )


def _own(choice: Choice) -> str:
    """A model on this disk that is not of the catalog."""
    return (
        f"<li><b>{escape(choice.title)}</b> <small>{gib(choice.memory_bytes)} GiB of memory · on this disk"
        f"</small>{_button(choice)}</li>"
    )


def _shipped(*, fetched: bool) -> str:
    """The shipped model where it cannot be loaded from here: the command that starts or fetches it."""
    command = "fluxchat web" if fetched else "fluxchat fetch"
    facts = "comes with FluxChat" if fetched else "its language model is not on this disk yet"
    return (
        f"<li><b>{SHIPPED_TITLE}</b> <small>{facts}</small><code>{command}</code>{copy_button(command)}</li>"
    )


def _entry(entry: StockEntry, choice: Choice | None, memory: float) -> str:
    """A model of the catalog. choice: given, there is a button for it."""
    best = entry.fits(memory)
    fits = {None: "too large here", "bf16": "fits"}.get(best, f"fits in {best}")
    here = choice is not None and choice.on_disk
    place = "on this disk" if here else f"{entry.download_gb:.1f} GB to download"
    tail = ""
    if choice is not None:
        tail = _button(choice)
    elif best is not None:
        command = f"fluxchat web --model {entry.name}"
        command += "" if best == "bf16" else f" --quantize {best}"
        tail = f"<code>{escape(command)}</code>{copy_button(command)}"
    facts = f"{entry.parameters / 1e3:.1f} B · {place} · {entry.licence} · {fits}"
    return (
        f"<li{'' if best else ' class=fc-off'}><b>{escape(entry.name.split('/')[-1])}</b> "
        f"<small>{escape(facts)}</small>{tail}</li>"
    )


def _button(choice: Choice) -> str:
    does = "Load" if choice.on_disk else "Download …"
    return (
        f'<button type="button" data-load="{escape(choice.name)}" aria-label="{does} {escape(choice.title)}">'
        f"{does}</button>"
    )


def confirmation(choice: Choice, size: int) -> str:
    """Asks whether so many bytes may be downloaded."""
    return (
        f'<div class="fc-loading" role="alert"><span>{escape(choice.title)} is not on this disk: '
        f"{size / 1e9:.2f} GB come from huggingface.co, {free_disk() / 1e9:.1f} GB are free.</span>"
        f'<button type="button" data-load="{escape(choice.name)}" data-bytes="{size}">'
        'Download and load</button><button type="button" data-load-not>Cancel</button></div>'
    )


def progress(loading: Loading) -> str:
    """How far a model is on its way."""
    title = escape(loading.choice.title)
    if loading.phase == "download":
        done, size = loading.downloaded, loading.size
        return (
            f'<div class="fc-loading"><span role="status">Downloading {title}</span>'
            f'<progress max="{size}" value="{done}" aria-label="Downloaded"></progress>'
            f"<small>{done / 1e9:.2f} of {size / 1e9:.2f} GB</small></div>"
        )
    return (
        f'<div class="fc-loading"><span role="status">Loading {title}</span>'
        f'<progress aria-label="Loading"></progress><small>{loading.seconds:.0f} s · '
        f"{gib(loading.choice.memory_bytes)} GiB · questions wait</small></div>"
    )


def price(choice: Choice, free: int) -> str:
    """What a second model takes while it is compared."""
    return (
        f'<p class="fc-note">{escape(choice.title)} takes {gib(choice.memory_bytes)} GiB of memory beside '
        f"the model in use, of {gib(free)} free; it is loaded for the comparison and freed after it.</p>"
    )
