// A part of the video is a part of the question: from and to on its timeline, a box on its picture. The shelf
// says what is chosen for each medium; what is changed here is sent as the event "part".
let part = { start: 0, end: null, region: null };
let sliding = false; // an edge is under the pointer: the shelf's answer must not move it
const choices = new Map(); // source -> {turn, part} chosen here, until the shelf says that the server has it
const EDGES = ["start", "end"];
const LEAST = 0.04; // of the picture's side: the smallest box
const edge = (name) => find(`[data-edge="${name}"]`);
const round = (value, digits = 3) => Number(value.toFixed(digits));

function length() {
  return Number(current()?.dataset.seconds || 0);
}

function showPart() {
  const medium = current(), seconds = length();
  find(".fc-part").hidden = !medium;
  if (!medium) {
    part = { start: 0, end: null, region: null };
    return drawBox();
  }
  for (const one of media()) {
    if (Number(one.dataset.turn) >= choices.get(one.dataset.src)?.turn) choices.delete(one.dataset.src);
  }
  if (sliding) return;
  part = { ...(choices.get(medium.dataset.src)?.part ?? JSON.parse(medium.dataset.part)) };
  find(".fc-range").hidden = medium.dataset.kind !== "video" || !seconds;
  for (const name of EDGES) {
    edge(name).max = seconds;
    edge(name).step = seconds > 120 ? 1 : 0.1;
    edge(name).value = part[name] ?? seconds;
  }
  drawRange();
  drawBox();
}

function drawRange() {
  const seconds = length(), start = part.start, end = part.end ?? seconds, line = find(".fc-line");
  line.style.setProperty("--from", `${(100 * start) / seconds}%`);
  line.style.setProperty("--to", `${(100 * end) / seconds}%`);
  for (const name of EDGES) edge(name).setAttribute("aria-valuetext", clock(part[name] ?? seconds));
  find(".fc-range output").textContent = start || part.end !== null ? `${clock(start)} – ${clock(part.end ?? Math.round(seconds))}` : "All of it";
}

function commit(wait = 0) {
  choose(current(), part, wait);
}

// The server's answers to what was chosen before are late: nothing is forgotten until it has this one.
function choose(medium, chosen, wait = 0) {
  const turn = Math.max(Date.now(), Number(medium.dataset.turn) + 1, (choices.get(medium.dataset.src)?.turn ?? 0) + 1);
  choices.set(medium.dataset.src, { turn, part: { ...chosen } });
  sendLater(wait);
}

let later = 0;
function sendLater(milliseconds) {
  clearTimeout(later);
  later = setTimeout(sendChoices, milliseconds);
}

const AGAIN_MS = 5000; // for what a full queue refused
function sendChoices() {
  const there = new Set(media().map((medium) => medium.dataset.src));
  for (const [source, choice] of choices) {
    if (there.has(source)) trigger("part", { source, turn: choice.turn, ...choice.part });
    else choices.delete(source);
  }
  if (choices.size) sendLater(AGAIN_MS);
}

function commitSoon() { // for keys, which come one after the other
  commit(300);
}

document.addEventListener("input", (event) => {
  const name = event.target.dataset?.edge;
  if (!name) return;
  const seconds = length(), least = Math.min(Number(event.target.step), seconds / 2);
  const start = Number(edge("start").value), end = Number(edge("end").value);
  sliding = true;
  if (name === "start") part.start = round(Math.min(start, end - least));
  else part.end = round(Math.max(end, part.start + least));
  part.start = Math.max(0, part.start);
  // The last step of the range: few lengths are a whole number of steps.
  if (part.end !== null && part.end > seconds - Number(event.target.step) + 1e-6) part.end = null;
  edge(name).value = part[name] ?? seconds;
  drawRange();
  move(part[name] ?? seconds, null); // the player shows where it is
}, true);

document.addEventListener("change", (event) => {
  if (!event.target.dataset?.edge) return;
  sliding = false;
  commitSoon();
}, true);

// -- the box -------------------------------------------------------------------------------------------------

// Where the picture is on the stage: the player leaves bars beside it.
function pictureArea() {
  const image = current()?.dataset.kind === "image", place = image ? find("#fluxchat-image img") : player();
  const [width, height] = image ? [place.naturalWidth, place.naturalHeight] : [place.videoWidth, place.videoHeight];
  const frame = place.getBoundingClientRect(), around = stage().getBoundingClientRect();
  if (!width || !frame.width) return null;
  const scale = Math.min(frame.width / width, frame.height / height);
  return {
    left: frame.left - around.left + (frame.width - scale * width) / 2,
    top: frame.top - around.top + (frame.height - scale * height) / 2,
    width: scale * width, height: scale * height,
  };
}

function drawBox() {
  const area = find(".fc-area"), box = find(".fc-box"), place = part.region && pictureArea();
  area.hidden = !place;
  find("[data-box]").setAttribute("aria-pressed", String(Boolean(part.region)));
  if (!place) return;
  for (const name of ["left", "top", "width", "height"]) area.style[name] = `${place[name]}px`;
  const [left, top, right, bottom] = part.region;
  Object.assign(box.style, { left: `${100 * left}%`, top: `${100 * top}%`, width: `${100 * (right - left)}%`, height: `${100 * (bottom - top)}%` });
}

function setRegion(region) {
  part.region = region && region.map((value) => round(Math.min(1, Math.max(0, value))));
  drawBox();
}

let drag = null; // {x, y: where it began; region: the box that is moved, null for a new one}
document.addEventListener("pointerdown", (event) => {
  const area = event.target.closest?.(".fc-area");
  if (!area || event.button) return;
  event.preventDefault();
  drag = { ...spot(event), region: event.target.closest(".fc-box") && [...part.region], before: [...part.region] };
  find(".fc-box").focus();
  sliding = true;
}, true);
document.addEventListener("pointermove", (event) => {
  if (!drag) return;
  const { x, y } = spot(event);
  if (drag.region) shift(drag.region, x - drag.x, y - drag.y);
  else if (Math.abs(x - drag.x) > LEAST && Math.abs(y - drag.y) > LEAST) {
    setRegion([Math.min(x, drag.x), Math.min(y, drag.y), Math.max(x, drag.x), Math.max(y, drag.y)]);
  }
}, true);
for (const name of ["pointerup", "pointercancel"]) {
  document.addEventListener(name, () => {
    if (!drag) return;
    const changed = String(drag.before) !== String(part.region);
    drag = null;
    sliding = false;
    if (changed) commit();
  }, true);
}

function spot(event) {
  const area = find(".fc-area").getBoundingClientRect(), within = (value) => Math.min(1, Math.max(0, value));
  return { x: within((event.clientX - area.left) / area.width), y: within((event.clientY - area.top) / area.height) };
}

function shift([left, top, right, bottom], x, y) {
  x = Math.min(1 - right, Math.max(-left, x));
  y = Math.min(1 - bottom, Math.max(-top, y));
  setRegion([left + x, top + y, right + x, bottom + y]);
}

const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
document.addEventListener("keydown", (event) => {
  if (!event.target.matches?.(".fc-box") || !part.region) return;
  if (event.key === "Delete" || event.key === "Backspace") {
    setRegion(null);
    find("[data-box]").focus();
    return commit();
  }
  if (!STEPS[event.key]) return;
  event.preventDefault();
  const [x, y] = STEPS[event.key].map((step) => step * 0.02), [left, top, right, bottom] = part.region;
  if (event.shiftKey) setRegion([left, top, Math.max(left + LEAST, right + x), Math.max(top + LEAST, bottom + y)]);
  else shift(part.region, x, y);
  commitSoon();
}, true);

Object.assign(clicks, {
  "[data-box]": () => {
    setRegion(part.region ? null : [0.25, 0.25, 0.75, 0.75]);
    if (part.region) find(".fc-box").focus();
    commit();
  },
  "[data-whole]": (button) => {
    const source = button.dataset.whole, medium = media().find((one) => one.dataset.src === source);
    if (!medium) return;
    choose(medium, { start: 0, end: null, region: null });
    if (medium === current()) showPart();
    else trigger("select", { source });
    focusQuestion();
  },
});
new ResizeObserver(drawBox).observe(stage());
for (const name of ["loadedmetadata", "load"]) {
  document.addEventListener(name, (event) => { if (event.target.closest?.(".fc-stage")) drawBox(); }, true);
}
watch("value", showPart);
showPart();
