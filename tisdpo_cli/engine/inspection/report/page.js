"use strict";
// Everything from the data is shown as text (textContent, never HTML). Values are integers of 1/10000, null is none.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const SIDES = ["chosen", "rejected"];
  const CLIPPED = 1, MASKED = 2, CUT = 4;
  const at = (id) => document.getElementById(id);
  const list = at("list"), card = at("card");
  const state = { mode: data.mode, page: 0, size: data.page, order: data.pairs.map((_, i) => i), search: "" };
  const words = data.vocab.map((entry) => entry[1]);

  const real = (whole) => (whole === null || whole === undefined ? null : whole / 1e4);
  const signed = (value) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(4);
  const figure = (value, mode) => (mode.neutral ? value.toFixed(4).replace("-", "−") : signed(value));
  const percent = (whole) => (real(whole) * 100).toFixed(1) + "%";

  function make(name, className, text) {
    const element = document.createElement(name);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  }

  function level(value, mode) {
    const distance = mode.log ? Math.log(Math.max(value, 1e-9)) : value - mode.neutral;
    return Math.trunc(Math.max(-1, Math.min(1, distance / mode.width)) * 4.999);
  }

  function classes(side, i) {
    const value = real(side.m[state.mode][i]), flags = side.f[i];
    const names = ["t"];
    if (value === null) names.push("none");
    else {
      const step = level(value, data.modes[state.mode]);
      if (step) names.push((step > 0 ? "p" : "n") + Math.abs(step));
      if (flags & MASKED && step === 0) names.push("masked");
    }
    if (flags & CLIPPED) names.push("clipped");
    if (data.vocab[side.t[i]][3] === "eos") names.push("eos");
    if (state.search && words[side.t[i]].replaceAll("·", " ").toLowerCase().includes(state.search)) names.push("found");
    return names.join(" ");
  }

  function tokens(side, pair, name) {
    const box = make("div", "tokens");
    box.dir = "auto";
    box.tabIndex = 0;
    box.setAttribute("role", "group");
    box.setAttribute("aria-label", `tokens of the ${name} response of pair ${pair.i}, arrow keys move`);
    let groups = side.g.slice(), inside = null;
    side.t.forEach((word, i) => {
      if (groups.length && groups[0][0] === i) {
        inside = make("span", "group", groups[0][2] + " ");
        box.append(inside);
      }
      const text = inside ? data.vocab[word][2] : words[word];
      const token = make("span", classes(side, i), text);
      token.dataset.i = i;
      if (text.startsWith("·") || inside) (inside || box).append(make("wbr"));
      (inside || box).append(token);
      if (inside && groups[0][1] === i + 1) {
        inside = null;
        groups.shift();
      }
      if (words[word].endsWith("⏎")) box.append(make("br"));
    });
    box.cells = [...box.querySelectorAll("span.t")];
    box.side = side;
    return box;
  }

  function article(pair) {
    const made = make("article");
    made.id = `pair-${pair.i}`;
    made.tabIndex = -1;
    const head = make("h3"), link = make("a", "", `pair ${pair.i}`);
    link.href = `#pair-${pair.i}`;
    head.append(link, " ", make("span", "soft where", pair.w));
    const prompt = make("div", "prompt", pair.p);
    prompt.dir = "auto";
    prompt.tabIndex = 0;
    prompt.setAttribute("role", "group");
    prompt.setAttribute("aria-label", "prompt");
    const both = make("div", "pair");
    SIDES.forEach((name, k) => {
      const side = pair.s[k], section = make("section"), told = make("p");
      const total = side.s[0] === null ? "" : `Σr ${signed(real(side.s[0])).slice(0, -2)}, `;
      told.append(
        make("span", `key-${name}`, name), " ",
        make("span", "soft", `${total}mean weight ${real(side.s[1]).toFixed(3)}, clipped ${percent(side.s[2])}, ` +
          `effective size ${percent(side.s[3])}`),
      );
      section.append(told, tokens(side, pair, name));
      both.append(section);
    });
    made.append(head, prompt, both);
    return made;
  }

  // Order, filter, search --------------------------------------------------------------------------------------

  const texts = new Map();
  function text(i) {
    if (!texts.has(i)) {
      const pair = data.pairs[i];
      const sides = pair.s.map((side) => side.t.map((word) => words[word]).join("").replaceAll("·", " "));
      texts.set(i, `${pair.p}\n${sides.join("\n")}`.toLowerCase());
    }
    return texts.get(i);
  }

  const margin = (pair) => pair.s[0].s[0] - pair.s[1].s[0];
  const known = (pair) => pair.s.flatMap((side) => side.m[state.mode].filter((v) => v !== null));
  const any = (pair, flag) => pair.s.some((side) => side.f.some((f) => f & flag));
  const FILTERS = {
    wrong: (pair) => pair.s[0].s[0] !== null && margin(pair) < 0,
    clipped: (pair) => any(pair, CLIPPED),
    cut: (pair) => any(pair, CUT),
  };
  const highest = (pair) => known(pair).reduce((a, b) => Math.max(a, b), -Infinity);
  const lowestMean = (pair) => Math.min(...pair.s.map((side) => {
    const values = side.m[state.mode].filter((v) => v !== null);
    return values.length ? values.reduce((a, b) => a + b, 0) / values.length : Infinity;
  }));
  const KEYS = { index: (p) => p.i, margin: (p) => margin(p), max: (p) => -highest(p), min: (p) => lowestMean(p) };

  function arrange() {
    const wanted = FILTERS[at("filter").value] || (() => true), key = KEYS[at("sort").value];
    state.search = at("search").value.trim().toLowerCase();
    state.order = data.pairs.map((_, i) => i)
      .filter((i) => wanted(data.pairs[i]) && (!state.search || text(i).includes(state.search)));
    if (key) {
      const keys = new Map(state.order.map((i) => [i, key(data.pairs[i])]));
      state.order.sort((a, b) => keys.get(a) - keys.get(b) || a - b);
    }
    state.page = 0;
    show();
  }

  function show() {
    hide();
    const pages = Math.max(1, Math.ceil(state.order.length / state.size));
    state.page = Math.max(0, Math.min(state.page, pages - 1));
    const from = state.page * state.size, part = state.order.slice(from, from + state.size);
    list.replaceChildren(...part.map((i) => article(data.pairs[i])));
    if (!part.length) list.append(make("p", "", "No pair is like that."));
    at("place").textContent = part.length
      ? `${from + 1} to ${from + part.length} of ${state.order.length}` : `0 of ${data.pairs.length}`;
    at("before").disabled = state.page === 0;
    at("after").disabled = state.page >= pages - 1;
    legend();
  }

  function legend() {
    const mode = data.modes[state.mode], box = at("legend");
    const scale = [-4, -3, -2, -1, 0, 1, 2, 3, 4].map((step) => make(
      "span", step ? (step > 0 ? "p" : "n") + Math.abs(step) : "", step ? (step > 0 ? "+" : "−") : String(mode.neutral)));
    box.replaceChildren(`${mode.name} ${mode.ends[0].toFixed(2)} `, ...scale, ` ${mode.ends[1].toFixed(2)}`);
  }

  function turn(by) {
    state.page += by;
    show();
    at("controls").scrollIntoView({ block: "start" });
  }

  // The card of a token ----------------------------------------------------------------------------------------

  function facts(side, i) {
    const [id, shown, bytes, kind] = data.vocab[side.t[i]], flags = side.f[i];
    const rows = [["token", shown], ["position, id", `${i}, ${id}`], ["bytes", bytes || "not told"]];
    const group = side.g.find(([from, to]) => from <= i && i < to);
    if (group) rows.push(["part of", group[2]]);
    if (kind === "eos") rows.push(["kind", "end of the sequence"]);
    if (side.l) ["log π⁺", "log π⁻"].forEach((name, k) => {
      if (side.l[k][i] !== null) rows.push([name, real(side.l[k][i]).toFixed(4)]);
    });
    data.modes.forEach((mode, k) => {
      const value = real(side.m[k][i]);
      if (value !== null) rows.push([mode.name, figure(value, mode)]);
    });
    if (flags & CLIPPED) rows.push(["weight without the clamp", figure(real(side.u[i]), data.modes[0])]);
    const notes = [flags & CLIPPED && "clipped", flags & MASKED && "weight 0", flags & CUT && "beyond the cut"];
    if (notes.some(Boolean)) rows.push(["note", notes.filter(Boolean).join(", ")]);
    return rows;
  }

  function point(token, speak) {
    const box = token.closest(".tokens"), rows = facts(box.side, Number(token.dataset.i));
    document.querySelectorAll(".tokens .on").forEach((other) => other.classList.remove("on"));
    token.classList.add("on");
    const body = make("dl");
    rows.forEach(([name, value]) => body.append(make("dt", "", name), make("dd", "", value)));
    card.replaceChildren(body);
    card.hidden = false;
    const place = token.getBoundingClientRect(), size = card.getBoundingClientRect();
    const left = Math.min(place.left, document.documentElement.clientWidth - size.width - 8);
    const below = place.bottom + size.height + 12 < window.innerHeight;
    card.style.left = `${Math.max(4, left) + window.scrollX}px`;
    card.style.top = `${(below ? place.bottom + 6 : Math.max(4, place.top - size.height - 6)) + window.scrollY}px`;
    if (speak) at("told").textContent = rows.map((row) => row.join(" ")).join("; ");
  }

  function hide() {
    card.hidden = true;
    document.querySelectorAll(".tokens .on").forEach((token) => token.classList.remove("on"));
  }

  list.addEventListener("mouseover", (event) => {
    const token = event.target.closest("span.t");
    if (token && token.closest(".tokens").cells) point(token, false);
    else hide();
  });
  list.addEventListener("mouseleave", hide);
  list.addEventListener("focusin", (event) => {
    if (event.target.cells && event.target.cells.length) point(event.target.cells[0], true);
  });
  list.addEventListener("focusout", hide);

  function step(box, by) {
    const now = box.cells.findIndex((cell) => cell.classList.contains("on"));
    const next = box.cells[Math.max(0, Math.min(box.cells.length - 1, now + by))];
    if (next) {
      next.scrollIntoView({ block: "nearest" });
      point(next, true);
    }
  }

  // Keys and permalinks ----------------------------------------------------------------------------------------

  function walk(by) {
    const every = [...list.querySelectorAll("article")];
    const now = every.findIndex((one) => one.contains(document.activeElement));
    const next = now < 0 ? (by > 0 ? 0 : every.length - 1) : now + by;
    if (next >= 0 && next < every.length) {
      every[next].focus();
      every[next].scrollIntoView({ block: "start" });
    }
  }

  const ACTIONS = {
    j: () => walk(1), k: () => walk(-1), n: () => turn(1), p: () => turn(-1),
    "/": () => at("search").focus(), Escape: () => hide(),
  };

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const focused = document.activeElement;
    if (focused && focused.cells && (event.key === "ArrowRight" || event.key === "ArrowLeft")) {
      const forward = (event.key === "ArrowRight") === (getComputedStyle(focused).direction === "ltr");
      step(focused, forward ? 1 : -1);
      event.preventDefault();
      return;
    }
    if (event.key !== "Escape" && /^(INPUT|SELECT|TEXTAREA)$/.test(focused ? focused.tagName : "")) return;
    if (ACTIONS[event.key]) {
      ACTIONS[event.key]();
      event.preventDefault();
    }
  });

  function follow() {
    const match = /^#pair-(\d+)$/.exec(location.hash);
    if (!match) return;
    const wanted = Number(match[1]);
    let place = state.order.findIndex((i) => data.pairs[i].i === wanted);
    if (place < 0) {
      ["filter", "search", "sort"].forEach((name) => { at(name).value = ""; });
      arrange();
      place = state.order.findIndex((i) => data.pairs[i].i === wanted);
    }
    if (place < 0) return;
    state.page = Math.floor(place / state.size);
    show();
    at(`pair-${wanted}`).scrollIntoView({ block: "start" });
  }

  // Begin ------------------------------------------------------------------------------------------------------

  data.modes.forEach((mode, k) => {
    const option = make("option", "", mode.name);
    option.value = k;
    at("mode").append(option);
  });
  at("mode").value = state.mode;
  at("mode").addEventListener("change", () => {
    state.mode = Number(at("mode").value);
    if (at("sort").value) arrange(); else show();
  });
  ["sort", "filter"].forEach((name) => at(name).addEventListener("change", arrange));
  let pause = 0;
  at("search").addEventListener("input", () => {
    clearTimeout(pause);
    pause = setTimeout(arrange, 150);
  });
  at("size").addEventListener("change", () => {
    state.size = Number(at("size").value);
    state.page = 0;
    show();
  });
  at("before").addEventListener("click", () => turn(-1));
  at("after").addEventListener("click", () => turn(1));
  at("theme").addEventListener("click", () => {
    const root = document.documentElement, system = matchMedia("(prefers-color-scheme: dark)").matches;
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : system;
    root.dataset.theme = dark ? "light" : "dark";
  });
  window.addEventListener("hashchange", follow);
  at("controls").hidden = false;
  at("keys").hidden = false;
  show();
  follow();
})();
