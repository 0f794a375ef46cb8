"use strict";
// Data is shown as text only (textContent, never HTML). Numbers are integers of 1/10000; null means no value.
// Keys of a pair and of a side: see `_pair` in page.py.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const SIDES = ["chosen", "rejected"];
  const CLIPPED = 1, MASKED = 2, TRUNCATED = 4;
  const byId = (id) => document.getElementById(id);
  const list = byId("list"), card = byId("card");
  const state = { mode: data.mode, page: 0, size: data.page, order: data.pairs.map((_, i) => i), search: "" };
  const words = data.vocab.map((entry) => entry[1]);

  const number = (integer) => (integer === null || integer === undefined ? null : integer / 1e4);
  const signed = (value) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(4);
  const formatted = (value, mode) => (mode.neutral ? value.toFixed(4).replace("-", "−") : signed(value));

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
    const value = number(side.m[state.mode][i]), flags = side.f[i];
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
    side.name = name;
    return box;
  }

  const unfolded = new Set();
  const promptText = (pair) => pair.p.t.map((turn) => turn.join(" ")).join("\n").toLowerCase();

  function prompt(pair) {
    const box = make("div", "prompt");
    box.tabIndex = 0;
    box.setAttribute("role", "group");
    box.setAttribute("aria-label", "prompt");
    pair.p.t.forEach(([role, text]) => {
      if (!role) {
        box.dir = "auto";
        box.textContent = text;
        return;
      }
      const turn = make("div", "turn"), body = make("div", "", text);
      body.dir = "auto";
      turn.append(make("b", "role", role), body);
      box.append(turn);
    });
    if (!pair.p.h) return box;
    const [what, role, text] = pair.p.h, fold = make("details", "fold"), summary = make("summary");
    summary.append(make("span", "soft", `${what}:`), " ");
    if (role) summary.append(make("b", "role", role), " ");
    summary.append(make("bdi", "shown", text));
    fold.append(summary, box);
    fold.open = unfolded.has(pair.i) || (state.search !== "" && promptText(pair).includes(state.search));
    summary.addEventListener("click", () => unfolded[fold.open ? "delete" : "add"](pair.i));
    return fold;
  }

  function article(pair) {
    const box = make("article");
    box.id = `pair-${pair.i}`;
    box.tabIndex = -1;
    const head = make("h3"), link = make("a", "", `pair ${pair.i}`);
    link.href = `#pair-${pair.i}`;
    head.append(link, " ", make("span", "soft where", pair.w));
    const columns = make("div", "pair");
    SIDES.forEach((name, k) => {
      const side = pair.s[k], section = make("section"), header = make("p");
      header.append(make("span", `key-${name}`, name), " ", make("span", "soft", side.h));
      section.append(header, tokens(side, pair, name));
      columns.append(section);
    });
    box.append(head, prompt(pair), columns);
    return box;
  }

  // Sort, filter, search ---------------------------------------------------------------------------------------

  const texts = new Map();
  function text(i) {
    if (!texts.has(i)) {
      const pair = data.pairs[i];
      const sides = pair.s.map((side) => side.t.map((word) => words[word]).join("").replaceAll("·", " "));
      texts.set(i, `${promptText(pair)}\n${sides.join("\n").toLowerCase()}`);
    }
    return texts.get(i);
  }

  const margin = (pair) => pair.s[0].s[0] - pair.s[1].s[0];
  const known = (pair) => pair.s.flatMap((side) => side.m[state.mode].filter((v) => v !== null));
  const any = (pair, flag) => pair.s.some((side) => side.f.some((f) => f & flag));
  const FILTERS = {
    wrong: (pair) => pair.s[0].s[0] !== null && margin(pair) < 0,
    clipped: (pair) => any(pair, CLIPPED),
    cut: (pair) => any(pair, TRUNCATED),
  };
  const highest = (pair) => known(pair).reduce((a, b) => Math.max(a, b), -Infinity);
  const lowestMean = (pair) => Math.min(...pair.s.map((side) => {
    const values = side.m[state.mode].filter((v) => v !== null);
    return values.length ? values.reduce((a, b) => a + b, 0) / values.length : Infinity;
  }));
  const KEYS = { index: (p) => p.i, margin: (p) => margin(p), max: (p) => -highest(p), min: (p) => lowestMean(p) };

  function applyOrder() {
    const wanted = FILTERS[byId("filter").value] || (() => true), key = KEYS[byId("sort").value];
    state.search = byId("search").value.trim().toLowerCase();
    state.order = data.pairs.map((_, i) => i)
      .filter((i) => wanted(data.pairs[i]) && (!state.search || text(i).includes(state.search)));
    if (key) {
      const keys = new Map(state.order.map((i) => [i, key(data.pairs[i])]));
      state.order.sort((a, b) => keys.get(a) - keys.get(b) || a - b);
    }
    state.page = 0;
    showPage();
  }

  function showPage() {
    hideCard();
    const pages = Math.max(1, Math.ceil(state.order.length / state.size));
    state.page = Math.max(0, Math.min(state.page, pages - 1));
    const from = state.page * state.size, part = state.order.slice(from, from + state.size);
    list.replaceChildren(...part.map((i) => article(data.pairs[i])));
    if (!part.length) list.append(make("p", "", "No matching pairs."));
    byId("place").textContent = part.length
      ? `${from + 1} to ${from + part.length} of ${state.order.length}` : `0 of ${data.pairs.length}`;
    byId("previous").disabled = state.page === 0;
    byId("next").disabled = state.page >= pages - 1;
    legend();
  }

  function legend() {
    const mode = data.modes[state.mode], box = byId("legend");
    const scale = [-4, -3, -2, -1, 0, 1, 2, 3, 4].map((step) => make(
      "span", step ? (step > 0 ? "p" : "n") + Math.abs(step) : "", step ? (step > 0 ? "+" : "−") : String(mode.neutral)));
    box.replaceChildren(`${mode.name} ${mode.ends[0].toFixed(2)} `, ...scale, ` ${mode.ends[1].toFixed(2)}`);
  }

  function turnPage(by) {
    state.page += by;
    showPage();
    byId("controls").scrollIntoView({ block: "start" });
  }

  // Token card -------------------------------------------------------------------------------------------------

  // The formula of the weight that colours, or else of the one in use, with the numbers of a token.
  function formula(side, i) {
    const k = data.modes[state.mode].formula ? state.mode : 0, template = data.modes[k].formula;
    const weight = number(side.m[k][i]);
    if (!template || weight === null) return null;
    const result = ` = ${weight.toFixed(2).replace("-", "−")}`;
    const isStop = data.vocab[side.t[i]][3] === "eos";
    if (isStop && data.eos !== "score") return `stop token: ${data.eos}${result}`;
    const short = (value) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(2);
    const sign = side.name === "rejected" ? -1 : 1, r = number(side.m[data.input][i]);
    const others = side.m[data.input].filter((value, j) =>
      value !== null && (isStop || data.vocab[side.t[j]][3] !== "eos"));
    const place = 1 + others.filter((value) => sign * number(value) > sign * r).length;
    const same = others.filter((value) => number(value) === r).length, n = others.length;
    const known = { r: short(r), s: short(sign * r), sign: sign < 0 ? "−" : "", n, place, last: n - 1,
      rank: n - place - (same - 1) / 2 };
    if (n === 1 && template.includes("{rank}")) return `a single token${result}`;
    const top = (percent) => Math.max(1, Math.floor(Number((n * percent / 100).toFixed(9))));
    return template.replace(/\{top ([^}]+)\}/, (_, percent) => top(Number(percent)))
      .replace(/\{(\w+)\}/g, (_, name) => known[name]) + result;
  }

  function cardRows(side, i) {
    const [id, shown, bytes, kind] = data.vocab[side.t[i]], flags = side.f[i];
    const rows = [["token", shown], ["position, id", `${i}, ${id}`], ["bytes", bytes || "unknown"]];
    const group = side.g.find(([from, to]) => from <= i && i < to);
    if (group) rows.push(["part of", group[2]]);
    if (kind === "eos") rows.push(["kind", "stop token"]);
    if (side.l) ["log π⁺", "log π⁻"].forEach((name, k) => {
      if (side.l[k][i] !== null) rows.push([name, number(side.l[k][i]).toFixed(4)]);
    });
    const spelled = formula(side, i);
    data.modes.forEach((mode, k) => {
      const value = number(side.m[k][i]);
      if (value !== null) rows.push([mode.name, formatted(value, mode)]);
      if (k === data.input && spelled) rows.push(["formula", spelled]);
    });
    if (flags & CLIPPED) rows.push(["weight without clamp", formatted(number(side.u[i]), data.modes[0])]);
    const notes = [flags & CLIPPED && "clipped", flags & MASKED && "weight 0", flags & TRUNCATED && "truncated"];
    if (notes.some(Boolean)) rows.push(["note", notes.filter(Boolean).join(", ")]);
    return rows;
  }

  function showCard(token, speak) {
    const box = token.closest(".tokens"), rows = cardRows(box.side, Number(token.dataset.i));
    document.querySelectorAll(".tokens .on").forEach((other) => other.classList.remove("on"));
    token.classList.add("on");
    const body = make("dl");
    rows.forEach(([name, value]) => body.append(make("dt", "", name), make("dd", "", value)));
    card.replaceChildren(body);
    card.hidden = false;
    // Measured where the edge of the page does not narrow it.
    card.style.left = card.style.top = "0px";
    const place = token.getBoundingClientRect(), size = card.getBoundingClientRect();
    const [left, top] = cardPlace(place, size);
    card.style.left = `${left + window.scrollX}px`;
    card.style.top = `${top + window.scrollY}px`;
    if (speak) byId("announcement").textContent = rows.map((row) => row.join(" ")).join("; ");
  }

  // Below the token, above it or beside it, wherever there is room; never on it.
  function cardPlace(token, size) {
    const gap = 6, width = document.documentElement.clientWidth, height = window.innerHeight;
    const left = Math.max(4, Math.min(token.left, width - size.width - 8));
    if (token.bottom + gap + size.height <= height) return [left, token.bottom + gap];
    if (token.top - gap - size.height >= 0) return [left, token.top - gap - size.height];
    const top = Math.max(4, Math.min(token.top, height - size.height - 4));
    if (token.right + gap + size.width <= width) return [token.right + gap, top];
    if (token.left - gap - size.width >= 0) return [token.left - gap - size.width, top];
    return [left, token.bottom + gap];
  }

  function hideCard() {
    card.hidden = true;
    document.querySelectorAll(".tokens .on").forEach((token) => token.classList.remove("on"));
  }

  list.addEventListener("mouseover", (event) => {
    const token = event.target.closest("span.t");
    if (token && token.closest(".tokens").cells) showCard(token, false);
    else hideCard();
  });
  list.addEventListener("mouseleave", hideCard);
  list.addEventListener("focusin", (event) => {
    if (event.target.cells && event.target.cells.length) showCard(event.target.cells[0], true);
  });
  list.addEventListener("focusout", hideCard);

  function moveToken(box, by) {
    const now = box.cells.findIndex((cell) => cell.classList.contains("on"));
    const next = box.cells[Math.max(0, Math.min(box.cells.length - 1, now + by))];
    if (next) {
      next.scrollIntoView({ block: "nearest" });
      showCard(next, true);
    }
  }

  // Keyboard and permalinks ------------------------------------------------------------------------------------

  function movePair(by) {
    const every = [...list.querySelectorAll("article")];
    const now = every.findIndex((one) => one.contains(document.activeElement));
    const next = now < 0 ? (by > 0 ? 0 : every.length - 1) : now + by;
    if (next >= 0 && next < every.length) {
      every[next].focus();
      every[next].scrollIntoView({ block: "start" });
    }
  }

  const ACTIONS = {
    j: () => movePair(1), k: () => movePair(-1), n: () => turnPage(1), p: () => turnPage(-1),
    "/": () => byId("search").focus(), Escape: () => hideCard(),
  };

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const focused = document.activeElement;
    if (focused && focused.cells && (event.key === "ArrowRight" || event.key === "ArrowLeft")) {
      const forward = (event.key === "ArrowRight") === (getComputedStyle(focused).direction === "ltr");
      moveToken(focused, forward ? 1 : -1);
      event.preventDefault();
      return;
    }
    if (event.key !== "Escape" && /^(INPUT|SELECT|TEXTAREA)$/.test(focused ? focused.tagName : "")) return;
    if (ACTIONS[event.key]) {
      ACTIONS[event.key]();
      event.preventDefault();
    }
  });

  function openLink() {
    const match = /^#pair-(\d+)$/.exec(location.hash);
    if (!match) return;
    const wanted = Number(match[1]);
    let place = state.order.findIndex((i) => data.pairs[i].i === wanted);
    if (place < 0) {
      ["filter", "search", "sort"].forEach((name) => { byId(name).value = ""; });
      applyOrder();
      place = state.order.findIndex((i) => data.pairs[i].i === wanted);
    }
    if (place < 0) return;
    state.page = Math.floor(place / state.size);
    showPage();
    byId(`pair-${wanted}`).scrollIntoView({ block: "start" });
  }

  // Start ------------------------------------------------------------------------------------------------------

  data.modes.forEach((mode, k) => {
    const option = make("option", "", mode.name);
    option.value = k;
    byId("mode").append(option);
  });
  byId("mode").value = state.mode;
  byId("mode").addEventListener("change", () => {
    state.mode = Number(byId("mode").value);
    if (byId("sort").value) applyOrder(); else showPage();
  });
  ["sort", "filter"].forEach((name) => byId(name).addEventListener("change", applyOrder));
  let pause = 0;
  byId("search").addEventListener("input", () => {
    clearTimeout(pause);
    pause = setTimeout(applyOrder, 150);
  });
  byId("size").addEventListener("change", () => {
    state.size = Number(byId("size").value);
    state.page = 0;
    showPage();
  });
  byId("previous").addEventListener("click", () => turnPage(-1));
  byId("next").addEventListener("click", () => turnPage(1));
  byId("theme").addEventListener("click", () => {
    const root = document.documentElement, system = matchMedia("(prefers-color-scheme: dark)").matches;
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : system;
    root.dataset.theme = dark ? "light" : "dark";
  });
  window.addEventListener("hashchange", openLink);
  byId("controls").hidden = false;
  byId("keys").hidden = false;
  showPage();
  openLink();
})();
