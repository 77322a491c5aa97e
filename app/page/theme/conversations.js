// Conversations that stay: text, frames and videos in this browser's own store (IndexedDB), never on the server.
// The server sends a record after each question and answer; reopening sends the videos and the record back.
const MEBI = 2 ** 20;
const quota = () => Number(find(".fc-list").dataset.quota) * MEBI; // bytes of videos; those of the oldest go first
const list = () => find("#fluxchat-list ul");
const evidence = new Map(); // key of a turn -> HTML of what its answer rests on
const known = new Set(); // keys of turns that this tab has seen
const renamed = new Map(); // name of a conversation that another tab has gone on with -> ours
const keys = new Map(); // path on the server -> key in the store of videos
let open = null; // the conversation on the page: as it was kept last
let number = 0; // of the last record
let saving = Promise.resolve(); // one after the other

// -- the store -----------------------------------------------------------------------------------------------

// Those who log in have a store each, also in one browser; who it is comes from the server.
const owner = !find('a[href="/logout"]') ? Promise.resolve("") : new Promise((done) => {
  const ask = () => { const place = find("[data-owner]"); return place ? done(`-${place.dataset.owner}`) : setTimeout(ask, 50); };
  ask();
});

let store = null;
async function database() {
  const name = `fluxchat${await owner}`;
  store ??= new Promise((done, failed) => {
    const request = indexedDB.open(name, 1);
    request.onupgradeneeded = () => {
      request.result.createObjectStore("conversations", { keyPath: "id" });
      request.result.createObjectStore("videos", { keyPath: "key" });
    };
    request.onsuccess = () => done(request.result);
    request.onerror = () => failed(request.error);
  });
  return store;
}

async function stored(name, mode, act) {
  const transaction = (await database()).transaction(name, mode);
  return new Promise((done, failed) => {
    const request = act(transaction.objectStore(name));
    transaction.oncomplete = () => done(request.result);
    transaction.onabort = transaction.onerror = () => failed(transaction.error);
  });
}
const get = (name, key) => stored(name, "readonly", (all) => all.get(key));
const put = (name, value) => stored(name, "readwrite", (all) => all.put(value));
const drop = (name, key) => stored(name, "readwrite", (all) => all.delete(key));

// Change what is kept of a conversation in one step: what another tab or an answer kept meanwhile stays.
// act: gives the new value for the one that is kept now, or nothing to leave it.
async function change(id, act) {
  const transaction = (await database()).transaction("conversations", "readwrite");
  const all = transaction.objectStore("conversations");
  return new Promise((done, failed) => {
    let changed;
    all.get(id).onsuccess = (event) => {
      changed = act(event.target.result);
      if (changed) all.put(changed);
    };
    transaction.oncomplete = () => done(changed);
    transaction.onabort = transaction.onerror = () => failed(transaction.error);
  });
}

async function conversations() {
  const all = await stored("conversations", "readonly", (place) => place.getAll());
  return all.sort((one, other) => other.updated - one.updated);
}

// -- videos within the quota ---------------------------------------------------------------------------------

async function keyOf(blob) {
  if (!crypto.subtle) return `${blob.size}-${Math.random().toString(36).slice(2)}`; // no https: nothing is shared
  const digest = await crypto.subtle.digest("SHA-256", await blob.arrayBuffer());
  return [...new Uint8Array(digest)].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

// Keep the file behind a path; its key, or "" where it cannot be had any more.
async function keepVideo(path) {
  if (keys.has(path)) return keys.get(path);
  let blob = brought.get(path);
  try {
    if (!blob) {
      const reply = await fetch(`${api}/file=${encodeURIComponent(path).replaceAll("%2F", "/")}`);
      if (!reply.ok) return "";
      blob = await reply.blob();
    }
    const key = await keyOf(blob);
    keys.set(path, key);
    brought.delete(path);
    if (blob.size <= quota() && !(await get("videos", key))) await put("videos", { key, blob, size: blob.size });
    return key;
  } catch { // the browser's own quota, or gone meanwhile: its frames stay
    return keys.get(path) ?? "";
  }
}

// Drop the videos that no conversation has, and those beyond the quota.
async function tidy() {
  const wanted = new Map(), all = await conversations();
  for (const talk of all) for (const medium of talk.media) if (!wanted.has(medium.key)) wanted.set(medium.key, wanted.size);
  const sizes = [];
  await stored("videos", "readonly", (place) => {
    const request = place.openCursor();
    request.onsuccess = () => {
      const cursor = request.result;
      if (!cursor) return;
      sizes.push([wanted.get(cursor.key) ?? Infinity, cursor.key, cursor.value.size]);
      cursor.continue();
    };
    return request;
  });
  let used = 0, count = 0;
  for (const [rank, key, size] of sizes.sort((one, other) => one[0] - other[0])) {
    if (rank === Infinity || used + size > quota()) await drop("videos", key);
    else { used += size; count += 1; }
  }
  const videos = count === 1 ? "1 video" : `${count} videos`;
  find("#fluxchat-kept").textContent =
    `Kept in this browser only. ${videos}, ${(used / MEBI).toFixed(used < 10 * MEBI ? 1 : 0)} of ${quota() / MEBI} MiB; the oldest go first.`;
}

// -- what the server says of the conversation ----------------------------------------------------------------

async function save(record) {
  for (const turn of record.turns) if (turn.details) evidence.set(turn.key, turn.details);
  if (!record.turns.length) return leave();
  let id = renamed.get(record.id) ?? record.id;
  let before = await get("conversations", id), parent = record.parent;
  if (before?.turns.some((turn) => !known.has(turn.key))) { // another tab went on with it: ours is a branch
    parent = id;
    id = `${record.id.slice(0, 40)}-${Math.random().toString(36).slice(2, 10)}`;
    renamed.set(record.id, id);
    before = undefined;
  }
  const from = before ?? (parent ? await get("conversations", parent) : undefined); // what it goes on from
  const media = [];
  for (const { path, ...medium } of record.media) {
    const old = keys.has(path) ? from?.media.find((one) => one.key === keys.get(path)) : null;
    media.push({ ...medium, thumbnail: medium.thumbnail || old?.thumbnail || "", key: await keepVideo(path) });
  }
  // What an answered turn was about may be gone from the server: it stays here.
  const own = new Map((from?.turns || []).map((turn) => [turn.key, turn]));
  const turns = record.turns.map((turn) => {
    known.add(turn.key);
    const old = own.get(turn.key);
    const about = !old?.media.length ? turn.media : old.media.map((one) => {
      const medium = from.media[one.medium];
      let place = media.findIndex((other) => other.key === medium.key);
      if (place < 0) place = media.push(medium) - 1;
      return { ...one, medium: place };
    });
    return { ...turn, media: about, details: evidence.get(turn.key) || "" };
  });
  const branch = from && !before ? `${titleOf(from).replace(/ \(branch\)$/, "")} (branch)` : "";
  const values = {
    id, parent: before?.parent ?? parent, model: record.model, media, turns,
    created: before?.created ?? Date.now(),
    updated: same(before, turns) ? before.updated : Date.now(),
  };
  // It may have been renamed or deleted while its videos were fetched.
  open = await change(id, (now) => ({ ...values, title: now?.title ?? branch, ...(now?.deleted && { deleted: true }) }));
  address(id);
  await draw();
  await tidy();
  await missing();
}

const same = (before, turns) => before && JSON.stringify(before.turns.map(said)) === JSON.stringify(turns.map(said));
const said = (turn) => [turn.key, turn.question, turn.text];

function leave() {
  open = null;
  address("");
  return draw().then(missing);
}

function address(id) {
  history.replaceState(null, "", id ? `#c=${id}` : location.pathname + location.search);
}

const titleOf = (talk) => talk.title || talk.turns[0]?.question.slice(0, 80) || "Conversation";

// -- reopening -----------------------------------------------------------------------------------------------

async function reopen(id, turn = ++asked) {
  isOpening(turn);
  try {
    if (!await reopenNow(id, turn)) isOpen(turn);
  } catch (reason) {
    isOpen(turn);
    throw reason;
  }
}

// Whether the server was asked to open it; its answer is the end of it.
async function reopenNow(id, turn) {
  const late = () => turn !== asked;
  const talk = await get("conversations", id).catch(() => null);
  if (late()) return;
  if (!talk || talk.deleted) {
    address(open?.id || "");
    return trigger("refused", { text: "That conversation is not kept in this browser: open the link where it was made." });
  }
  const files = [];
  try {
    for (const medium of talk.media) {
      const kept = medium.key && await get("videos", medium.key);
      if (late()) return;
      if (!kept) { files.push(null); continue; }
      const [path] = await upload([new File([kept.blob], medium.name, { type: kept.blob.type })], medium.name, late);
      keys.set(path, medium.key);
      brought.delete(path);
      files.push({ path });
    }
  } catch (reason) {
    if (late()) return;
    say("");
    return trigger("refused", { text: String(reason) });
  }
  if (late()) return;
  say("");
  for (const turn of talk.turns) {
    known.add(turn.key);
    if (turn.details) evidence.set(turn.key, turn.details);
  }
  open = talk;
  address(id);
  draw().catch(unkept);
  if (reopening) reopening.sent = revision();
  setTimeout(isOpen, LONGEST_OPENING_MS, turn); // the connection is gone
  trigger("reopen", {
    files, turn,
    kept: {
      id, parent: talk.parent, media: talk.media.map((medium) => medium.name),
      turns: talk.turns.map(({ details, ...turn }) => turn),
    },
  });
  focusQuestion();
  return true;
}

// Videos of the open conversation that are kept no more: their frames show, and the page asks for the files.
async function missing() {
  const place = find(".fc-missing"), talk = open, gone = [];
  for (const medium of talk?.media || []) {
    const used = talk.turns.some((turn) => turn.media.some((one) => talk.media[one.medium] === medium));
    if (used && !(medium.key && await get("videos", medium.key))) gone.push(medium);
  }
  if (talk !== open) return; // the one that is open now is looked at by itself
  place.hidden = !gone.length;
  place.replaceChildren(...gone.map((medium) => {
    const row = make("p"), picture = make("img", { alt: "", src: medium.thumbnail });
    const button = make("button", { type: "button", textContent: "Choose the file" });
    button.dataset.bring = talk.media.indexOf(medium);
    row.append(...(medium.thumbnail ? [picture] : []), make("span", { textContent: `${medium.name} is not kept any more: its frames are.` }), button);
    return row;
  }));
}

function bring(button) {
  const medium = open.media[Number(button.dataset.bring)], talk = open;
  const field = make("input", { type: "file", accept: "video/*,image/*" });
  field.onchange = async () => {
    const [blob] = field.files, turn = ++asked;
    const key = await keyOf(blob);
    if (medium.key && medium.key.length === 64 && key !== medium.key) {
      return trigger("refused", { text: `${blob.name} is another file than the ${medium.name} of this conversation: choose that one, or start a new conversation.` });
    }
    await put("videos", { key, blob, size: blob.size });
    const found = (one) => (one.name === medium.name && one.key === medium.key ? { ...one, key } : one);
    await change(talk.id, (now) => now && { ...now, media: now.media.map(found) });
    await reopen(talk.id, turn);
  };
  field.id = "fluxchat-bring";
  field.hidden = true;
  find("#fluxchat-bring")?.remove();
  document.body.append(field);
  field.click();
}

// What an answer of a reopened conversation rests on is put where the server left a place for it.
function fillEvidence() {
  for (const place of document.querySelectorAll("#fluxchat-chat [data-evidence]:empty")) {
    const html = evidence.get(place.dataset.evidence);
    if (html) place.innerHTML = html;
  }
}

// -- the list ------------------------------------------------------------------------------------------------

function make(name, values = {}) {
  return Object.assign(document.createElement(name), values);
}

function day(time) {
  const then = new Date(time), days = Math.round((new Date().setHours(0, 0, 0, 0) - new Date(time).setHours(0, 0, 0, 0)) / 864e5);
  if (days < 1) return `today ${then.toTimeString().slice(0, 5)}`;
  return days === 1 ? "yesterday" : then.toLocaleDateString(undefined, { day: "numeric", month: "short", year: days > 300 ? "numeric" : undefined });
}

function matches(talk, words) {
  const text = [titleOf(talk), ...talk.media.map((medium) => medium.name), ...talk.turns.flatMap((turn) => [turn.question, turn.text])];
  const all = text.join("\n").toLowerCase();
  return words.every((word) => all.includes(word));
}

let deleted = null; // {id, title}: what can be brought back
let drawing = Promise.resolve(); // one after the other: the last to be drawn is the last that was read
function draw() {
  drawing = drawing.catch(() => {}).then(drawNow);
  return drawing;
}

async function drawNow() {
  const words = find("#fluxchat-search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const every = (await conversations()).filter((talk) => !talk.deleted);
  const all = every.filter((talk) => matches(talk, words));
  const menu = find("[data-menu][aria-expanded=true]")?.dataset.menu, focus = document.activeElement?.dataset?.focus;
  moving = true; // the field that is typed into is moved, not left
  list().replaceChildren(...all.map(item));
  if (renaming) showField();
  moving = false;
  if (!all.length) list().append(make("li", { className: "fc-note", textContent: every.length ? "Nothing found." : "What you ask appears here, and stays." }));
  if (menu) showMenu(menu, true);
  if (focus) find(`[data-focus="${CSS.escape(focus)}"]`)?.focus();
  const undo = find(".fc-undo");
  undo.replaceChildren();
  if (deleted) {
    const button = make("button", { type: "button", textContent: "Undo" });
    button.dataset.undo = deleted.id;
    undo.append(make("span", { textContent: `Deleted “${deleted.title}”.` }), button);
  }
}

function item(talk) {
  const row = make("li"), title = titleOf(talk), button = make("button", { type: "button", title });
  row.dataset.conversation = talk.id;
  if (talk.id === open?.id) button.setAttribute("aria-current", "true");
  button.dataset.open = talk.id;
  button.dataset.focus = `open-${talk.id}`;
  const picture = talk.media.find((medium) => medium.thumbnail)?.thumbnail;
  const count = talk.turns.length === 1 ? "1 question" : `${talk.turns.length} questions`;
  const text = make("span");
  text.append(make("b", { textContent: title }), make("small", { textContent: `${day(talk.updated)} · ${count}` }));
  button.append(picture ? make("img", { alt: "", src: picture }) : make("i"), text);
  const more = make("button", { type: "button", textContent: "⋯", ariaLabel: `More about “${title}”`, ariaExpanded: "false" });
  more.dataset.menu = talk.id;
  more.dataset.focus = `menu-${talk.id}`;
  row.append(button, more);
  return row;
}

const ACTIONS = [["rename", "Rename"], ["link", "Copy link"], ["markdown", "Export Markdown"], ["json", "Export JSON"], ["delete", "Delete"]];
function showMenu(id, show) {
  for (const other of document.querySelectorAll("[data-menu][aria-expanded=true]")) other.ariaExpanded = "false";
  document.querySelectorAll(".fc-menu").forEach((menu) => menu.remove());
  const button = show && find(`[data-menu="${CSS.escape(id)}"]`);
  if (!button) return;
  button.ariaExpanded = "true";
  const menu = make("div", { className: "fc-menu", role: "group", ariaLabel: "What to do with it" });
  for (const [act, text] of ACTIONS) {
    const choice = make("button", { type: "button", textContent: text });
    Object.assign(choice.dataset, { act, of: id, focus: `${act}-${id}` });
    menu.append(choice);
  }
  button.closest("li").append(menu);
}

let renaming = null; // {id, field}: a name that is being typed
let moving = false;

function showField() {
  const { id, field } = renaming, row = find(`[data-conversation="${CSS.escape(id)}"]`), { selectionStart, selectionEnd } = field;
  if (!row) return void (renaming = null);
  find("[data-open]", row).hidden = true;
  row.prepend(field);
  field.focus();
  field.setSelectionRange(selectionStart, selectionEnd);
}

function rename(id) {
  const value = find(`[data-open="${CSS.escape(id)}"]`).title;
  const field = make("input", { value, ariaLabel: "Name of the conversation", maxLength: 120 });
  showMenu(id, false);
  renaming = { id, field };
  showField();
  field.select();
  let ended = false;
  const end = async (keep) => {
    if (ended || moving) return;
    ended = true;
    renaming = null;
    if (keep && field.value.trim()) {
      const title = field.value.trim();
      await change(id, (now) => now && { ...now, title });
      if (open?.id === id) open.title = title;
    }
    await draw();
    find(`[data-focus="menu-${CSS.escape(id)}"]`)?.focus();
  };
  field.onkeydown = (event) => {
    if (event.key === "Enter") end(true);
    if (event.key === "Escape") end(false);
  };
  field.onblur = () => end(true);
}

const act = {
  rename,
  link: (id, button) => {
    const link = `${location.origin}${location.pathname}#c=${id}`;
    navigator.clipboard?.writeText(link).then(() => { button.textContent = "Copied"; }, () => { prompt("The link", link); });
  },
  markdown: async (id) => download(await get("conversations", id), "md", asMarkdown, "text/markdown"),
  json: async (id) => download(await get("conversations", id), "json", (talk) => JSON.stringify(asExport(talk), null, 1), "application/json"),
  delete: async (id) => {
    await purge();
    const talk = await change(id, (now) => now && { ...now, deleted: true });
    if (talk) deleted = { id, title: titleOf(talk) };
    if (open?.id === id) trigger("fresh");
    await draw();
    find("[data-undo]")?.focus();
  },
};

async function undo(id) {
  await change(id, (now) => {
    const { deleted: _, ...talk } = now ?? {};
    return now && talk;
  });
  if (deleted?.id === id) deleted = null;
  await draw();
  find(`[data-focus="open-${CSS.escape(id)}"]`)?.focus();
}

// What was deleted earlier goes for good.
async function purge() {
  deleted = null;
  for (const talk of await conversations()) if (talk.deleted) await drop("conversations", talk.id);
}

// -- export: the form is that of app/conversation_files.py ---------------------------------------------------

function asExport(talk) {
  const shown = new Set();
  const messages = talk.turns.flatMap((turn) => {
    const groups = [...new DOMParser().parseFromString(turn.details || "", "text/html").querySelectorAll(".fc-frames")];
    const pieces = [];
    turn.media.forEach((one, index) => {
      const medium = talk.media[one.medium], name = JSON.stringify(one);
      if (shown.has(name)) return; // it stands in the turn that first asked about it
      shown.add(name);
      const frames = [...(groups[index]?.querySelectorAll(".fc-frame") || [])].map((frame) => ({
        time_s: frame.dataset.seek === undefined ? null : Number(frame.dataset.seek),
        jpeg: frame.querySelector("img").getAttribute("src").split(",")[1],
      }));
      pieces.push({ name: medium.name, duration_s: medium.duration_s, part: { start_s: one.start, end_s: one.end, region: one.region }, frames });
    });
    const answer = turn.text || turn.error;
    return [
      { role: "user", content: [...pieces, { text: turn.question }] },
      ...(answer ? [{ role: "assistant", content: [{ text: answer }] }] : []),
    ];
  });
  return { format: "fluxchat export", version: 1, model: talk.model, messages };
}

function plain(text) {
  const safe = text.replace(/[\\`*_[\]]/g, "\\$&").replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const lines = safe.split(/\r\n|[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]/);
  if (!lines.at(-1)) lines.pop();
  return lines.map((line) => (/^[#+\-=~|]/.test(line) ? `\\${line}` : line)).join("  \n");
}

function asMarkdown(talk) {
  const { model, messages } = asExport(talk), lines = [`# Conversation with ${plain(model)}`, ""];
  for (const { role, content } of messages) {
    lines.push(`**${role === "user" ? "You" : "Assistant"}**`, "");
    for (const piece of content) {
      if (piece.text !== undefined) { lines.push(plain(piece.text), ""); continue; }
      const { start_s, end_s, region } = piece.part, about = piece.duration_s ? [clock(piece.duration_s)] : [];
      if (start_s || end_s !== null) about.push(`from ${clock(start_s)} to ${clock(end_s ?? piece.duration_s)}`);
      if (region) about.push(`the box ${region.join(", ")}`);
      lines.push(`*${plain(piece.name)}*${about.length ? ` (${about.join(", ")})` : ""}`, "");
      const pictures = piece.frames.map((frame) => `![${frame.time_s === null ? plain(piece.name) : clock(Math.floor(10 * frame.time_s) / 10)}](data:image/jpeg;base64,${frame.jpeg})`);
      if (pictures.length) lines.push(pictures.join(" "), "");
    }
  }
  return lines.join("\n");
}

function download(talk, suffix, write, type) {
  const name = titleOf(talk).replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 60) || "conversation";
  const link = make("a", { href: URL.createObjectURL(new Blob([write(talk)], { type })), download: `${name}.${suffix}` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

// -- the side ------------------------------------------------------------------------------------------------

const narrow = matchMedia("(max-width: 1100px)");
const sideOpen = () => document.documentElement.classList.contains("fc-side-open");
const sideCovers = () => sideOpen() && narrow.matches;

function showSide(show) {
  document.documentElement.classList.toggle("fc-side-open", show);
  find("[data-side]").setAttribute("aria-expanded", String(show));
  if (!narrow.matches) try { localStorage.setItem("fluxchat-side", show); } catch { /* not allowed */ }
}

Object.assign(clicks, {
  "[data-side]": () => showSide(!sideOpen()),
  "[data-open]": (button) => {
    if (narrow.matches) showSide(false);
    reopen(button.dataset.open);
  },
  "[data-menu]": (button) => showMenu(button.dataset.menu, button.ariaExpanded !== "true"),
  "[data-act]": (button) => act[button.dataset.act](button.dataset.of, button),
  "[data-undo]": (button) => undo(button.dataset.undo),
  "[data-bring]": bring,
});
document.addEventListener("keydown", (event) => {
  const button = event.key === "Escape" && find("[data-menu][aria-expanded=true]");
  if (!button || !event.target.closest?.("#fluxchat-list")) return;
  showMenu(button.dataset.menu, false);
  button.focus();
});
document.addEventListener("input", (event) => { if (event.target.id === "fluxchat-search") draw(); });
document.addEventListener("pointerdown", (event) => {
  if (sideCovers() && !event.target.closest("#fluxchat-side, [data-side]")) showSide(false);
}, true);
addEventListener("hashchange", () => {
  const id = location.hash.match(/^#c=([\w-]+)$/)?.[1];
  if (id && id !== open?.id) reopen(id);
});

const unkept = () => { find("#fluxchat-kept").textContent = "This browser keeps nothing for this page: conversations end with it."; };
new MutationObserver(() => {
  const place = find("#fluxchat-record [data-record]");
  if (!place) return;
  const record = JSON.parse(place.dataset.record);
  if (record.number <= number) return; // overtaken on its way
  number = record.number;
  saving = saving.then(() => save(record)).catch(unkept);
}).observe(find("#fluxchat-record"), { childList: true, subtree: true, attributes: true });
new MutationObserver(fillEvidence).observe(document.body, { childList: true, subtree: true }); // the talk comes later

find("[data-side]").setAttribute("aria-expanded", String(sideOpen()));
if (linked) isOpening(0);
purge().then(draw).then(tidy).then(() => {
  if (linked && !asked) return reopen(linked);
  isOpen(0);
}).catch(() => { isOpen(0); unkept(); });
