// Runs once when the page is there. What the page draws itself (player, frames, times, shelf, prices) is plain
// HTML with data attributes; one listener turns clicks on it into moves of the player or events for the server.
const find = (selector, place = document) => place.querySelector(selector);
const root = (window.gradio_config?.root || "").replace(/\/$/, "");
const api = `${root}${window.gradio_config?.api_prefix ?? "/gradio_api"}`;
const stage = () => find(".fc-stage");
const player = () => find("#fluxchat-video video");
const question = () => find("#fluxchat-question textarea");
const current = () => find("#fluxchat-shelf [aria-current]");
const media = () => [...document.querySelectorAll("#fluxchat-shelf .fc-medium")];
const shown = () => Math.max(0, media().indexOf(current()));
const touch = matchMedia("(pointer: coarse)").matches;

// -- the question bar ----------------------------------------------------------------------------------------

// On a touch screen the keyboard would cover the answer.
function focusQuestion() {
  if (!touch) question()?.focus({ preventScroll: true });
}

// Whether a question waits for the conversation that is being opened; it is sent then.
let questionWaits = false;
function waits(event) {
  if (!reopening) return false;
  event.preventDefault();
  event.stopPropagation();
  if (!questionWaits) onceOpen(() => { questionWaits = false; find("#fluxchat-send")?.click(); });
  questionWaits = true;
  say("Opening the conversation, then it is asked …");
  return true;
}

function showSettings(open) {
  document.body.classList.toggle("fc-settings-open", open);
  find("[data-settings]").setAttribute("aria-expanded", String(open));
}

document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && event.target === question()) {
    if (event.isComposing) return event.stopPropagation();
    if (event.shiftKey) return event.stopPropagation(); // a new line; Gradio would send
    if (waits(event)) return;
  }
  if (event.key !== "Escape" || find("dialog[open]") || event.target.closest?.("#fluxchat-list :is(input, li)")) return;
  const stop = find("#fluxchat-stop");
  if (stop && stop.offsetParent) stop.click();
  else if (document.body.classList.contains("fc-settings-open")) showSettings(false);
  else if (sideCovers()) showSide(false);
  if (!event.target.closest?.("#fluxchat-chat textarea")) focusQuestion();
}, true);

// Set here, not by the server: its answer could come after the next move of the slider.
function setBudget(tokens) {
  const slider = find('#fluxchat-budget input[type="range"]'), auto = find('#fluxchat-auto input[type="checkbox"]');
  if (auto?.checked) auto.click();
  slider.value = tokens;
  slider.dispatchEvent(new Event("input", { bubbles: true }));
  slider.dispatchEvent(new PointerEvent("pointerup", { bubbles: true }));
}

// A question that was taken leaves its box, unless something else was typed meanwhile.
let taken = 0;
new MutationObserver(() => {
  const place = find("#fluxchat-taken [data-taken]"), field = question();
  if (!place || Number(place.dataset.number) <= taken) return;
  taken = Number(place.dataset.number);
  if (field.value !== place.dataset.taken) return;
  field.value = "";
  field.dispatchEvent(new Event("input", { bubbles: true }));
}).observe(find("#fluxchat-taken"), { childList: true, subtree: true, attributes: true });

// Gradio tells of a slider's release by pointer only; the keyboard counts as well.
document.addEventListener("keyup", (event) => {
  const slider = event.target;
  if (slider.matches?.('input[type="range"]') && event.key !== "Tab") {
    slider.dispatchEvent(new PointerEvent("pointerup", { bubbles: true }));
  }
}, true);

// -- what is brought in --------------------------------------------------------------------------------------

function say(text) {
  const place = find(".fc-upload");
  place.hidden = !text;
  find("span", place).textContent = text || "";
}

const brought = new Map(); // path on the server -> the file that was sent

// Send files to the server: a promise of their paths there; rejected with a sentence. late: whether nobody waits
// for them any more.
function upload(files, name, late = () => false) {
  const form = new FormData(), request = new XMLHttpRequest();
  for (const file of files) form.append("files", file, file.name || "pasted.png");
  request.upload.onprogress = (event) => {
    if (late()) return request.abort();
    const share = event.lengthComputable ? ` ${Math.floor((100 * event.loaded) / event.total)} %` : "";
    say(event.loaded < event.total ? `Sending ${name}${share}` : `Opening ${name} …`);
  };
  say(`Sending ${name}`);
  return new Promise((done, refused) => {
    request.onload = () => {
      let answer = null;
      try { answer = JSON.parse(request.responseText); } catch { /* not ours */ }
      if (request.status !== 200 || !Array.isArray(answer)) return refused(refusal(request.status, answer, name));
      answer.forEach((path, index) => brought.set(path, files[index]));
      done(answer);
    };
    request.onabort = () => refused("");
    request.onerror = () => refused(`The server could not be reached: ${name} was not sent. Try again.`);
    request.open("POST", `${api}/upload`);
    request.send(form);
  });
}

function send(files) {
  if (!files.length) return;
  const name = files.length > 1 ? `${files.length} files` : files[0].name || "the picture";
  upload(files, name).then(
    (paths) => onceOpen(() => trigger("files", { files: paths.map((path) => ({ path })) })),
    (text) => { say(""); trigger("refused", { text }); },
  );
}

function refusal(status, answer, name) {
  const reason = answer?.error?.message || answer?.detail;
  if (typeof reason === "string") return reason;
  return status === 413 ? `${name} is larger than this server takes: cut it or scale it down first.`
    : `The server did not take ${name} (${status}): try again.`;
}

document.addEventListener("change", (event) => {
  if (event.target.id !== "fluxchat-file") return;
  send([...event.target.files]);
  event.target.value = "";
  focusQuestion();
});

const carriesFiles = (event) => [...(event.dataTransfer?.types || [])].includes("Files");
for (const name of ["dragenter", "dragover", "dragleave", "drop"]) {
  document.addEventListener(name, (event) => {
    if (!carriesFiles(event)) return;
    event.preventDefault();
    event.stopPropagation();
    const away = name === "drop" || (name === "dragleave" && !event.relatedTarget);
    document.body.classList.toggle("fc-dropping", !away);
    if (name === "drop") {
      send([...event.dataTransfer.files]);
      focusQuestion();
    }
  }, true);
}

document.addEventListener("paste", (event) => {
  const files = [...(event.clipboardData?.files || [])];
  if (!files.length) return;
  event.preventDefault();
  event.stopPropagation();
  send(files);
}, true);

// -- the camera ----------------------------------------------------------------------------------------------

let camera = null, recorder = null;

async function openCamera() {
  const devices = navigator.mediaDevices;
  try {
    camera = await devices.getUserMedia({ video: true, audio: true }).catch(() => devices.getUserMedia({ video: true }));
  } catch {
    trigger("refused", { text: "There is no camera here, or this page may not use it: allow it in the browser." });
    return;
  }
  const view = find(".fc-camera video");
  view.srcObject = camera;
  view.play();
  stage().dataset.recording = "";
  drawStage();
  find("[data-record]").focus();
}

function closeCamera() {
  camera?.getTracks().forEach((track) => track.stop());
  camera = recorder = null;
  delete stage().dataset.recording;
  find("[data-record]").textContent = "Record";
  drawStage();
}

function record() {
  if (recorder) return recorder.stop();
  const parts = [], kept = camera;
  recorder = new MediaRecorder(kept);
  recorder.ondataavailable = (event) => parts.push(event.data);
  recorder.onstop = () => {
    const type = (parts[0]?.type || "video/webm").split(";")[0];
    const stamp = new Date().toTimeString().slice(0, 8).replaceAll(":", "");
    closeCamera();
    send([new File(parts, `camera-${stamp}.${type.includes("mp4") ? "mp4" : "webm"}`, { type })]);
    focusQuestion();
  };
  recorder.start(250);
  find("[data-record]").textContent = "Stop recording";
}

// -- the player ----------------------------------------------------------------------------------------------

let wanted = null; // {medium, start, end}: where the player goes once it has that medium
let piece = null; // {start, end}: the part that plays by itself

function drawStage() {
  const medium = current(), recording = "recording" in stage().dataset;
  const kind = recording ? "camera" : medium ? medium.dataset.kind : "";
  find("#fluxchat-video").hidden = kind !== "video";
  find("#fluxchat-image").hidden = kind !== "image";
  find(".fc-camera").hidden = kind !== "camera";
  find(".fc-drop").hidden = kind !== "";
  stage().toggleAttribute("data-empty", kind === "");
  document.body.classList.toggle("fc-has-media", kind !== "");
}

// A server that does two things at once may send the older shelf last: ask what is true.
let newest = 0;
const revision = () => Number(find("#fluxchat-shelf [data-revision]")?.dataset.revision || 0);
function overtaken() {
  if (revision() < newest) trigger("overtaken");
  newest = Math.max(newest, revision());
  if (reopening && newest > reopening.sent) isOpen(reopening.turn);
}

// The shelf has changed: show what it says is current. A player that has its file already is left alone.
function follow() {
  overtaken();
  say("");
  const medium = current(), video = player(), picture = find("#fluxchat-image img");
  const source = medium ? root + medium.dataset.src : "";
  const image = medium?.dataset.kind === "image";
  find(".fc-unplayable").hidden = true;
  if (image) picture.src = source;
  else picture.removeAttribute("src");
  if (image || !medium) {
    video.pause();
    if (video.getAttribute("src")) {
      video.removeAttribute("src");
      video.load();
    }
  } else if (video.getAttribute("src") !== source) {
    video.src = source;
  }
  if (!medium || piece?.medium !== shown()) endPiece();
  drawStage();
  if (wanted && wanted.medium === shown()) {
    const { start, end } = wanted;
    wanted = null;
    if (medium && !image) move(start, end);
  }
}

function move(start, end) {
  const video = player();
  const go = () => {
    video.currentTime = Math.min(start, video.duration || start);
    if (end !== null) {
      piece = { start, end, medium: shown() };
      find(".fc-piece span").textContent = `${clock(start)} – ${clock(end)}`;
      find(".fc-piece").hidden = false;
      video.play().catch(() => {});
    }
  };
  endPiece();
  if (video.readyState > 0) go();
  else video.addEventListener("loadedmetadata", go, { once: true });
}

function endPiece() {
  piece = null;
  find(".fc-piece").hidden = true;
}

// As encoder/video/clock.py writes it: "0:05", "1:02.5", "1:23:45".
function clock(seconds) {
  const tenths = Math.round(10 * seconds), minutes = Math.floor(tenths / 600) % 60, hours = Math.floor(tenths / 36000);
  const rest = ((tenths % 600) / 10).toFixed(1).replace(/\.0$/, "");
  const [whole, part] = rest.split("."), tail = whole.padStart(2, "0") + (part ? `.${part}` : "");
  return hours ? `${hours}:${String(minutes).padStart(2, "0")}:${tail}` : `${minutes}:${tail}`;
}

function seek(medium, start, end = null) {
  if (medium === null || medium === shown()) return move(start, end);
  wanted = { medium, start, end };
  trigger("select", { source: media()[medium]?.dataset.src });
}

for (const name of ["timeupdate", "error"]) {
  document.addEventListener(name, (event) => {
    const video = player();
    if (event.target !== video) return;
    if (name === "error") find(".fc-unplayable").hidden = !video.getAttribute("src");
    else if (piece && video.currentTime >= piece.end && !video.paused) {
      video.pause();
      video.currentTime = piece.end;
    }
  }, true);
}

// -- clicks --------------------------------------------------------------------------------------------------

// Another conversation is begun: one that is being opened does not come any more.
function elsewhere() {
  asked += 1;
  isOpen(asked);
}

const clicks = {
  "[data-attach]": () => find("#fluxchat-file").click(),
  "[data-camera]": () => openCamera(),
  "[data-record]": () => record(),
  "[data-camera-off]": () => { closeCamera(); focusQuestion(); },
  "[data-settings]": () => showSettings(!document.body.classList.contains("fc-settings-open")),
  "[data-models]": () => find("#fluxchat-models").showModal(),
  "[data-models-close]": () => find("#fluxchat-models").close(),
  "[data-load]": (button) => {
    find("#fluxchat-models").close();
    trigger("model", { name: button.dataset.load, bytes: Number(button.dataset.bytes || 0) });
    focusQuestion();
  },
  "[data-load-not]": () => { trigger("model_not"); focusQuestion(); },
  "[data-fresh]": () => { elsewhere(); trigger("fresh"); focusQuestion(); },
  "[data-dismiss]": () => { trigger("dismiss"); focusQuestion(); },
  "[data-preset]": (button) => {
    for (const other of document.querySelectorAll("[data-preset]")) {
      other.setAttribute("aria-pressed", String(other === button));
    }
    setBudget(button.dataset.preset);
    focusQuestion();
  },
  "[data-suggest]": (button) => { onceOpen(() => trigger("suggest", { text: button.dataset.suggest })); focusQuestion(); },
  "[data-example]": (button) => { elsewhere(); trigger("example", { index: Number(button.dataset.example) }); focusQuestion(); },
  "[data-seek]": (frame) => seek(Number(frame.dataset.medium), Number(frame.dataset.seek)),
  "[data-chapters]": () => { chaptersWanted = true; trigger("chapters", { source: current()?.dataset.src }); },
  "[data-chapters-stop]": () => trigger("chapters_stop"),
  "[data-show]": (button) => trigger("select", { source: button.parentElement.dataset.src }),
  "[data-remove]": (button) => { trigger("delete", { source: button.parentElement.dataset.src }); focusQuestion(); },
  "[data-clip]": clip,
  "[data-again]": () => piece && move(piece.start, piece.end),
  "[data-copy]": (button) => {
    navigator.clipboard?.writeText(button.dataset.copy).then(() => {
      button.textContent = "Copied";
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    }, () => {});
  },
  "#fluxchat-dark": () => {
    const dark = document.body.classList.toggle("dark");
    try { localStorage.setItem("fluxchat-dark", dark); } catch { /* not allowed: it lasts until the reload */ }
  },
  "#fluxchat-send, #fluxchat-stop": () => setTimeout(focusQuestion),
};

document.addEventListener("click", (event) => {
  const time = event.target.closest('#fluxchat-chat a[href*="#t="], #fluxchat-compare a[href*="#t="]');
  if (time) {
    event.preventDefault();
    event.stopPropagation();
    const [start, end] = time.getAttribute("href").split("#t=")[1].split(",").map(Number);
    return seek(null, start, end === undefined ? null : end);
  }
  if (event.target.closest("#fluxchat-send") && waits(event)) return;
  for (const [selector, act] of Object.entries(clicks)) {
    const target = event.target.closest(selector);
    if (target) return act(target);
  }
  if (event.target.id === "fluxchat-models") event.target.close(); // beside the dialog
}, true);

// -- clips ---------------------------------------------------------------------------------------------------

const CLIP_S = 2; // before and after a single time

// Beside each time in an answer, a button that saves that piece as a file.
function offerClips() {
  for (const link of document.querySelectorAll('#fluxchat-chat a[href*="#t="]:not([data-clipped])')) {
    link.dataset.clipped = "";
    const button = document.createElement("button");
    Object.assign(button, { type: "button", className: "fc-clip", textContent: "clip", ariaLabel: `Save ${link.textContent} as a clip`, title: "Save this piece as a file" });
    button.dataset.clip = link.getAttribute("href").split("#t=")[1];
    link.after(button);
  }
}

function clip(button) {
  const [start, end] = button.dataset.clip.split(",").map(Number), seconds = Number(current()?.dataset.seconds || 0);
  const from = end === undefined ? start - CLIP_S : start, to = end === undefined ? start + CLIP_S : end;
  say("Cutting …");
  trigger("clip", { source: current()?.dataset.src, start: Math.max(0, from), end: seconds ? Math.min(seconds, to) : to });
}

let made = "";
function saveMade() {
  const link = find("#fluxchat-made [data-made]");
  if (!link || link.dataset.made === made) return;
  made = link.dataset.made;
  const saved = document.createElement("a");
  Object.assign(saved, { href: root + link.getAttribute("href"), download: link.download });
  saved.click();
  say(link.dataset.told);
}

let chaptersWanted = false; // they were asked for: the first one is brought into view
function showChapters() {
  if (!chaptersWanted || !find(".fc-chapters li")) return;
  chaptersWanted = false;
  find("#fluxchat-chapters").scrollIntoView({ block: touch || innerWidth < 700 ? "start" : "nearest" });
}

new MutationObserver(() => {
  offerClips();
  saveMade();
  showChapters();
  if (find("#fluxchat-problem [role=alert]") && ["Cutting …", "Opening …"].includes(find(".fc-upload span")?.textContent)) say("");
}).observe(document.body, { childList: true, subtree: true, attributes: true, attributeFilter: ["data-made"] });

// -- a frame under the pointer, large ------------------------------------------------------------------------

const large = document.body.appendChild(document.createElement("img"));
large.id = "fluxchat-large";
large.alt = "";
large.hidden = true;

function enlarge(frame) {
  const picture = frame && find("img", frame);
  large.hidden = !picture;
  if (!picture) return;
  large.src = picture.src;
  const place = frame.getBoundingClientRect(), width = Math.min(416, innerWidth - 16);
  const height = (width * picture.naturalHeight) / picture.naturalWidth;
  const left = Math.max(8, Math.min(place.left + place.width / 2 - width / 2, innerWidth - width - 8));
  const top = place.top > height + 12 ? place.top - height - 6 : Math.min(place.bottom + 6, innerHeight - height - 8);
  Object.assign(large.style, { left: `${left}px`, top: `${top}px`, width: `${width}px` });
}

if (!touch) {
  document.addEventListener("pointerover", (event) => enlarge(event.target.closest?.(".fc-frame")));
  document.addEventListener("focusin", (event) => enlarge(event.target.closest?.(".fc-frame:focus-visible")));
  document.addEventListener("scroll", () => enlarge(null), true);
}

// -- what comes from the server ------------------------------------------------------------------------------

watch("value", follow);
follow();
if (document.activeElement === document.body) focusQuestion();
try {
  const dark = localStorage.getItem("fluxchat-dark");
  if (dark !== null) document.body.classList.toggle("dark", dark === "true");
} catch { /* not allowed */ }
