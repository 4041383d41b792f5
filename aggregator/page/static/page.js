// Keeps the page as the fleet is: takes what has changed from the server, changes no more of the
// page than that, and asks for what the operator wants done.
(() => {
  "use strict";
  const $ = (id) => document.getElementById(id);

  // -- times: the server says when, the page says how long ago ------------------------------------

  function age(seconds) {
    const s = Math.max(0, Math.round(seconds));
    if (s < 5) return "now";
    if (s < 60) return `${s} s ago`;
    if (s < 3600) return `${Math.floor(s / 60)} min ago`;
    if (s < 172800) return `${Math.floor(s / 3600)} h ago`;
    return `${Math.floor(s / 86400)} days ago`;
  }

  function tellAges() {
    const now = Date.now();
    for (const time of document.querySelectorAll("time[datetime]")) {
      const left = (Date.parse(time.getAttribute("datetime")) - now) / 1000;
      const words = left > 5 ? `in ${age(left).replace(" ago", "")}` : age(-left);
      if (time.textContent !== words) time.textContent = words;
    }
  }

  // -- change the page to what a fragment says, and leave the rest as it is -----------------------

  const keyOf = (node) => node.nodeType === 1 && (node.getAttribute("data-key") || node.id) || null;

  function same(a, b) {
    return a.nodeType === b.nodeType && a.nodeName === b.nodeName && keyOf(a) === keyOf(b);
  }

  function morph(now, next) {
    if (now.nodeType === 3) {
      if (now.nodeValue !== next.nodeValue) now.nodeValue = next.nodeValue;
      return;
    }
    if (now.nodeType !== 1) return;
    if (now.nodeName === "TIME" && now.getAttribute("datetime") === next.getAttribute("datetime")) return;
    if (now.nodeName === "CANVAS") {
      now.dataset.map = next.dataset.map; // its size is the script's
      return;
    }
    morphAttributes(now, next);
    // What somebody is filling in is theirs.
    if (now.nodeName === "INPUT" || now.nodeName === "SELECT") return;
    morphChildren(now, next);
  }

  function morphAttributes(now, next) {
    for (const { name, value } of [...next.attributes]) {
      if (now.getAttribute(name) !== value && name !== "open") now.setAttribute(name, value);
    }
    for (const { name } of [...now.attributes]) {
      if (!next.hasAttribute(name) && name !== "open" && name !== "disabled") now.removeAttribute(name);
    }
  }

  function morphChildren(now, next) {
    const known = new Map();
    for (const child of now.children) if (keyOf(child)) known.set(keyOf(child), child);
    let at = now.firstChild;
    for (const wanted of [...next.childNodes]) {
      const key = keyOf(wanted);
      let found = key ? known.get(key) : at && same(at, wanted) ? at : null;
      if (found && !same(found, wanted)) found = null;
      if (!found) {
        now.insertBefore(wanted, at);
        continue;
      }
      if (found === at) at = at.nextSibling;
      else now.insertBefore(found, at);
      morph(found, wanted);
    }
    while (at) {
      const after = at.nextSibling;
      at.remove();
      at = after;
    }
  }

  function put(id, html) {
    const section = $(id);
    if (!section) return;
    const next = document.createElement("section");
    next.innerHTML = html;
    morphChildren(section, next);
  }

  // -- what the server tells ----------------------------------------------------------------------

  function state(word, text) {
    const live = $("live");
    if (!live) return;
    if (live.dataset.state === word) return;
    live.dataset.state = word;
    live.lastElementChild.textContent = text;
  }

  let source = null;

  function listen() {
    if (source || !document.querySelector("[data-fragment]")) return;
    source = new EventSource(location.pathname + location.search);
    source.addEventListener("page", (event) => {
      const { title, fragments } = JSON.parse(event.data);
      state("on", "live");
      document.title = title;
      for (const [id, html] of Object.entries(fragments)) put(id, html);
      settle();
    });
    source.onerror = () => {
      state("lost", "connection lost");
      if (source.readyState === EventSource.CLOSED) {
        source = null;
        setTimeout(listen, 3000);
        fetch("/api/v1/fleet").then(letIn, () => {});
      }
    };
  }

  // A session ends after some hours, and with the aggregator: the token is asked for again.
  function letIn(answer) {
    if (answer.status === 401) location.assign("/login");
  }

  // A page that nobody looks at asks for nothing.
  document.addEventListener("visibilitychange", () => {
    if (!document.hidden) return listen();
    if (source) source.close();
    source = null;
    state("off", "not live");
  });

  // -- the map of a large fleet -------------------------------------------------------------------

  const STATES = {
    t: "training", u: "uploading", d: "downloading", i: "idle", p: "planning", w: "waiting",
    x: "unfit", s: "stopped", o: "offline", q: "quarantined",
  };
  const GAP = 1;

  function grid(canvas) {
    const count = canvas.dataset.map.length;
    const width = canvas.clientWidth;
    const cell = Math.max(5, Math.min(16, Math.floor(Math.sqrt((width * 150) / count))));
    const columns = Math.max(1, Math.floor(width / cell));
    return { count, cell, columns, height: Math.ceil(count / columns) * cell };
  }

  function drawMap(canvas) {
    const { count, cell, columns, height } = grid(canvas);
    const dense = devicePixelRatio || 1;
    const said = `${canvas.dataset.map}|${canvas.clientWidth}|${dense}|${dark.matches}`;
    if (canvas.drawn === said) return;
    canvas.drawn = said;
    canvas.style.height = `${height}px`;
    canvas.width = canvas.clientWidth * dense;
    canvas.height = height * dense;
    const styles = getComputedStyle(document.documentElement);
    const colours = Object.fromEntries(Object.entries(STATES).map(
      ([letter, word]) => [letter, styles.getPropertyValue(`--s-${word}`).trim()]));
    const pen = canvas.getContext("2d");
    pen.scale(dense, dense);
    for (let i = 0; i < count; i++) {
      pen.fillStyle = colours[canvas.dataset.map[i]] || colours.o;
      pen.fillRect((i % columns) * cell, Math.floor(i / columns) * cell, cell - GAP, cell - GAP);
    }
  }

  function placeOnMap(canvas, event) {
    const { count, cell, columns } = grid(canvas);
    const box = canvas.getBoundingClientRect();
    const column = Math.floor((event.clientX - box.left) / cell);
    const at = Math.floor((event.clientY - box.top) / cell) * columns + column;
    return column < columns && at < count ? at : -1;
  }

  // -- what a chart tells where it is pointed at, or gone through with the arrow keys -------------

  const tip = $("tip");

  function show(lines, x, y) {
    tip.textContent = lines;
    tip.hidden = false;
    const width = tip.offsetWidth;
    const height = tip.offsetHeight;
    const left = Math.min(Math.max(8, x - width / 2), document.documentElement.clientWidth - width - 8);
    tip.style.left = `${left + scrollX}px`;
    tip.style.top = `${(y - height - 14 < 0 ? y + 18 : y - height - 14) + scrollY}px`;
  }

  function hide() {
    if (tip) tip.hidden = true;
    for (const hit of document.querySelectorAll(".hit.on")) hit.classList.remove("on");
  }

  function pointAt(hit) {
    hide();
    hit.classList.add("on");
    const box = hit.getBoundingClientRect();
    show(hit.dataset.tip, box.left + box.width / 2, box.top);
  }

  document.addEventListener("pointermove", (event) => {
    const target = event.target;
    if (target.classList && target.classList.contains("hit")) return pointAt(target);
    if (target.dataset && target.dataset.map) {
      const at = placeOnMap(target, event);
      if (at >= 0) return show(`${STATES[target.dataset.map[at]] || "?"}, device ${at + 1}`, event.clientX, event.clientY);
    }
    if (!document.activeElement || !document.activeElement.hasAttribute("data-chart")) hide();
  });

  document.addEventListener("keydown", (event) => {
    const chart = event.target.closest && event.target.closest("[data-chart]");
    const step = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    if (event.key === "Escape") return hide();
    if (!chart || step === undefined) return;
    event.preventDefault();
    const hits = [...chart.querySelectorAll(".hit")];
    const on = hits.findIndex((hit) => hit.classList.contains("on"));
    const from = on < 0 ? (step > 0 ? -1 : hits.length) : on;
    const at = Math.min(Math.max(from + step, 0), hits.length - 1);
    if (!hits[at]) return;
    pointAt(hits[at]);
    $("said").textContent = hits[at].dataset.tip;
    $("said").dataset.kind = "quiet";
  });
  document.addEventListener("focusout", (event) => {
    if (event.target.hasAttribute && event.target.hasAttribute("data-chart")) hide();
  });

  document.addEventListener("click", (event) => {
    const map = event.target.dataset && event.target.dataset.map ? event.target : null;
    const at = map ? placeOnMap(map, event) : -1;
    if (at >= 0) location.href = map.dataset.href + at;
  });

  // -- actions ------------------------------------------------------------------------------------

  let hush = 0;

  function say(words, kind) {
    const said = $("said");
    said.textContent = words;
    said.dataset.kind = kind;
    clearTimeout(hush);
    hush = setTimeout(() => { said.dataset.kind = "quiet"; }, kind === "bad" ? 12000 : 6000);
  }

  // Asks in a dialog; resolves to whether it is to be done.
  function confirmed(question, label, secret) {
    const dialog = $("ask");
    const [title, words, code] = dialog.querySelectorAll("h2, p, pre");
    title.textContent = label;
    words.textContent = question;
    code.textContent = secret || "";
    code.hidden = !secret;
    const buttons = dialog.querySelectorAll("button");
    buttons[0].hidden = Boolean(secret);
    buttons[1].textContent = secret ? "Done" : label;
    dialog.returnValue = "no"; // Escape leaves what it was closed with before
    dialog.showModal();
    buttons[secret ? 1 : 0].focus();
    return new Promise((resolve) => {
      dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
    });
  }

  function fields(form) {
    const said = {};
    for (const input of form.elements) {
      // What nobody has touched may be another now: it is not sent as it was.
      if (!input.name || (form.dataset.changes !== undefined && input.value === input.defaultValue)) continue;
      said[input.name] = input.hasAttribute("data-number") ? Number(input.value) : input.value;
    }
    return said;
  }

  const headers = { "content-type": "application/json", "x-tunefleet": "action" };

  async function act(form) {
    const button = form.querySelector("button");
    const label = button.textContent;
    const { question, then, shows, method = "POST" } = form.dataset;
    const wanted = fields(form);
    if (form.dataset.changes !== undefined && !Object.keys(wanted).length) return say("Nothing is changed here yet.", "bad");
    if (question && !(await confirmed(question, label))) return;
    button.disabled = true;
    try {
      const answer = await fetch(form.action, {
        method, credentials: "same-origin", headers, body: JSON.stringify(wanted),
      });
      const told = await answer.json().catch(() => ({}));
      letIn(answer);
      if (!answer.ok) return say(problem(told, answer.status), "bad");
      for (const input of form.elements) if (form.dataset.changes !== undefined) input.defaultValue = input.value;
      form.reset(); // from now on it shows what the server says
      if (then) return void location.assign(then);
      if (shows !== undefined) {
        await confirmed(`It lets ${told.device} in, once. Enter on the device:`, "A token", told.command);
        return;
      }
      say(`${label}: ${told.said}`, "good");
    } catch {
      say("The aggregator does not answer.", "bad");
    } finally {
      button.disabled = false;
    }
  }

  function problem(told, status) {
    if (Array.isArray(told.detail)) return told.detail.map((one) => `${one.loc.at(-1)}: ${one.msg}`).join("; ");
    return told.detail || `The aggregator said ${status}.`;
  }

  document.addEventListener("submit", (event) => {
    const form = event.target;
    if (!form.hasAttribute("data-act")) return;
    event.preventDefault();
    act(form);
  });

  // -- begin --------------------------------------------------------------------------------------

  const dark = matchMedia("(prefers-color-scheme: dark)");

  function settle() {
    tellAges();
    for (const canvas of document.querySelectorAll("canvas[data-map]")) drawMap(canvas);
  }

  dark.addEventListener("change", settle);
  addEventListener("resize", settle);
  setInterval(tellAges, 1000);
  settle();
  listen();
})();
