// What is clicked, typed or sent before the page, or the conversation that is being opened, is there.
const early = window.fluxchatEarly;
for (const name of ["click", "dragover", "drop"]) window.removeEventListener(name, early[name], true);
setTimeout(() => { // once all of this script has run
  for (const target of early.targets) {
    for (const [selector, act] of Object.entries(clicks)) {
      const found = selector.startsWith("[") && target.isConnected && target.closest(selector);
      if (found) {
        act(found);
        break;
      }
    }
  }
  send([...early.files, ...find("#fluxchat-file").files]);
});

const linked = location.hash.match(/^#c=([\w-]+)$/)?.[1]; // before a question asked meanwhile gives the page its own

// The conversation that is being opened: what is asked or brought in meanwhile belongs to it, and waits for it.
let reopening = null; // {turn, sent: revision of the shelf when the server was asked, ended, promise}
let asked = 0; // grows with each click that leads to another conversation: only the last one counts
const LONGEST_OPENING_MS = 60_000;
function isOpening(turn) {
  const before = reopening, place = { turn, sent: Infinity };
  place.promise = new Promise((done) => { place.ended = done; });
  place.promise.then(() => { if (reopening === place) reopening = null; });
  reopening = place;
  before?.promise && place.promise.then(before.ended); // what waited for that one waits for this one
}
function isOpen(turn) {
  if (reopening && reopening.turn <= turn) reopening.ended();
}
function onceOpen(act) {
  if (reopening) reopening.promise.then(() => setTimeout(act)); // after what the page shows of it
  else act();
}

