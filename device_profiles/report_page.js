// Draws the figures in the reader's colour scheme, redraws them when it changes, and brings one
// device to the front when its name is chosen.
(() => {
  "use strict";
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const root = document.documentElement;
  const scheme = matchMedia("(prefers-color-scheme: dark)");
  const bar = document.querySelector(".devices");
  const NARROW_PX = 520;
  let chosen = null;

  // "$d0/0.2" becomes the custom property --d0 with that opacity.
  function colour(token, styles) {
    const parts = /^\$([a-z]+\d?)(?:\/([\d.]+))?$/.exec(token);
    if (!parts) return token;
    const hex = styles.getPropertyValue("--" + parts[1]).trim();
    if (parts[2] === undefined) return hex;
    const channel = (at) => parseInt(hex.slice(at, at + 2), 16);
    return `rgba(${channel(1)},${channel(3)},${channel(5)},${parts[2]})`;
  }

  // Copies a figure; only what stands under a key of colours is looked up, never a text.
  function coloured(value, styles, isColour) {
    if (typeof value === "string") return isColour ? colour(value, styles) : value;
    if (Array.isArray(value)) return value.map((item) => coloured(item, styles, isColour));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(
      ([key, item]) => [key, coloured(item, styles, /color(scale)?$/.test(key))]));
  }

  function focus(figure) {
    for (const trace of figure.data) {
      const own = trace.meta && trace.meta.device === chosen;
      if (trace.meta && trace.meta.quiet) trace.visible = own;
      if (chosen !== null && trace.meta && !own) trace.opacity = 0.13;
    }
    for (const note of figure.layout.annotations || []) {
      if (chosen !== null && note.name.split(":")[1] !== String(chosen)) note.opacity = 0.3;
    }
  }

  function fit(figure, width) {
    const notes = figure.layout.annotations || [];
    if (width >= NARROW_PX || !notes.some((note) => note.name.startsWith("end:"))) return;
    figure.layout.annotations = notes.filter((note) => !note.name.startsWith("end:"));
    figure.layout.margin.r = 14;
  }

  function draw() {
    const styles = getComputedStyle(root);
    for (const [slug, raw] of Object.entries(figures)) {
      const place = document.getElementById(slug);
      const figure = coloured(raw, styles, false);
      focus(figure);
      fit(figure, place.clientWidth);
      figure.layout.font.family = styles.getPropertyValue("--sans").trim();
      figure.layout.width = place.clientWidth;
      Plotly.react(place, figure.data, figure.layout, { displayModeBar: false });
    }
  }

  function choose(button) {
    const device = Number(button.dataset.device);
    chosen = chosen === device ? null : device;
    bar.classList.toggle("chosen", chosen !== null);
    for (const other of bar.children) {
      other.setAttribute("aria-pressed", String(Number(other.dataset.device) === chosen));
    }
    draw();
  }

  bar.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button) choose(button);
  });
  scheme.addEventListener("change", draw);
  let width = root.clientWidth;
  let waiting = 0;
  addEventListener("resize", () => {
    if (root.clientWidth === width) return;
    width = root.clientWidth;
    cancelAnimationFrame(waiting);
    waiting = requestAnimationFrame(draw);
  });
  draw();
})();
