// In the head: what is clicked or dropped before the page's script has run is remembered, and done by it then.
window.fluxchatEarly = {
  targets: [],
  files: [],
  click: (event) => window.fluxchatEarly.targets.push(event.target),
  dragover: (event) => event.preventDefault(), // else the browser leaves the page for the file
  drop: (event) => {
    event.preventDefault();
    window.fluxchatEarly.files.push(...event.dataTransfer.files);
  },
};
for (const name of ["click", "dragover", "drop"]) window.addEventListener(name, window.fluxchatEarly[name], true);
