// The search of the library: a dialog whose hits the server draws. A hit is named by its place in a search.
const finder = () => find("#fluxchat-find");
let searched = 0; // the search that was asked for last; what comes of earlier ones is not shown
let drawn = 0;
let opening = 0; // the choice of a hit whose video the shelf does not show yet

document.addEventListener("submit", (event) => {
  if (!event.target.closest("#fluxchat-find")) return;
  event.preventDefault();
  const text = find("input", finder()).value.trim();
  if (!text) return;
  searched = Math.max(Date.now(), searched + 1);
  find("[role=status]", finder()).textContent = "Searching …";
  trigger("search", { text, turn: searched });
}, true);

function drawHits() {
  const found = find("#fluxchat-found [data-found]"), turn = Number(found?.dataset.found);
  if (!found || turn !== searched || turn === drawn) return;
  drawn = turn;
  const note = find("p", found), list = find("ol", found);
  find("[role=status]", finder()).replaceChildren(...note.cloneNode(true).childNodes);
  find(".fc-hits", finder()).replaceChildren(...(list ? [list.cloneNode(true)] : []));
}

Object.assign(clicks, {
  "[data-find]": () => {
    finder().showModal();
    find("input", finder()).select();
  },
  "[data-find-close]": () => finder().close(),
  "[data-hit]": (button) => {
    opening = Math.max(Date.now(), opening + 1);
    finder().close();
    say("Opening …");
    const hit = { index: Number(button.dataset.hit), search: drawn, turn: opening };
    onceOpen(() => trigger("hit", hit));
    focusQuestion();
  },
});
document.addEventListener("click", (event) => {
  if (event.target === finder()) finder().close(); // beside it
});

// The player goes to where the hit begins, once the shelf has it.
function showHit() {
  const medium = current();
  if (!opening || !(Number(medium?.dataset.turn) >= opening)) return;
  opening = 0;
  if (medium.dataset.kind === "video") move(part.start, null);
}

if (finder()) {
  new MutationObserver(drawHits).observe(find("#fluxchat-found"), { childList: true, subtree: true, attributes: true });
  watch("value", showHit);
}
