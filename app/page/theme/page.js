// Runs once when the page is there. Everything the page draws itself (frames, times, shelf) is plain HTML with
// data attributes; one listener turns clicks on it into moves of the player or events for the server.
const player = () => document.querySelector("#fluxchat-video video");
const shown = () => {
  const current = document.querySelector("#fluxchat-shelf [aria-current] [data-show]");
  return current ? Number(current.dataset.show) : 0;
};

function seek(time, medium) {
  if (medium !== null && medium !== shown()) {
    trigger("select", { index: medium, time });
    return;
  }
  const video = player();
  if (!video) return;
  const go = () => { video.currentTime = Math.min(time, video.duration || time); };
  if (video.readyState > 0) go();
  else video.addEventListener("loadedmetadata", go, { once: true });
  video.scrollIntoView({ block: "nearest", behavior: "smooth" });
}

document.addEventListener("click", (event) => {
  const frame = event.target.closest("[data-seek]");
  if (frame) return seek(Number(frame.dataset.seek), Number(frame.dataset.medium));
  const time = event.target.closest('#fluxchat-chat a[href*="#t="], #fluxchat-compare a[href*="#t="]');
  if (time) {
    event.preventDefault();
    event.stopPropagation();
    return seek(Number(time.getAttribute("href").split("#t=")[1]), null);
  }
  const show = event.target.closest("[data-show]");
  if (show) return trigger("select", { index: Number(show.dataset.show), time: 0 });
  const remove = event.target.closest("[data-remove]");
  if (remove) return trigger("delete", { index: Number(remove.dataset.remove) });
  const example = event.target.closest("[data-example]");
  if (example) return trigger("example", { index: Number(example.dataset.example) });
  if (event.target.closest("#fluxchat-dark")) document.body.classList.toggle("dark");
}, true);

// Gradio tells of a slider's release by pointer only; the keyboard counts as well.
document.addEventListener("keyup", (event) => {
  const slider = event.target;
  if (slider.matches && slider.matches('input[type="range"]') && event.key !== "Tab") {
    slider.dispatchEvent(new PointerEvent("pointerup", { bubbles: true }));
  }
}, true);
