// Draws the page's figures when they come into sight and its tables a page at a time, from the JSON in #data.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const NONE = "–", THIN = "\u202f", PAGE = 10;
  const RIGHT = new Set(["integer", "number", "signed", "percent", "seconds", "bytes"]);
  const make = (tag, attributes = {}, ...children) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name === "class") element.className = value; else element.setAttribute(name, value);
    }
    element.append(...children);
    return element;
  };

  // The same forms as pieces.written in Python.
  const number = (value) => {
    if (value === 0) return "0";
    const size = Math.abs(value);
    const text = size >= 1e-3 && size < 1e4 ? value.toFixed(3)
      : size >= 1e-5 && size < 1e-3 ? value.toFixed(5)
      : value.toExponential(1).replace(/e([+-])(\d)$/, "e$10$2");
    return text.replaceAll("-", "−");
  };
  // One precision for all values of a column; digits below 0: in powers of ten.
  const exact = (value, kind, digits) => {
    if (kind === "percent") return (100 * value).toFixed(digits).replaceAll("-", "−") + THIN + "%";
    if (kind === "seconds") return value.toFixed(digits) + THIN + "s";
    const text = digits < 0 ? (value === 0 ? "0" : value.toExponential(1).replace(/e([+-])(\d)$/, "e$10$2")) : value.toFixed(digits);
    if (!/[1-9]/.test(text)) return text.replace("-", "");
    return (kind === "signed" && value > 0 ? "+" : "") + text.replaceAll("-", "−");
  };
  const forms = {
    integer: (value) => String(Math.trunc(value)).replace("-", "−").replace(/\B(?=(\d{3})+(?!\d))/g, THIN),
    number,
    signed: (value) => (value > 0 ? "+" : "") + number(value),
    percent: (value) => (100 * value >= 9.95 || value === 0 ? (100 * value).toFixed(0) : (100 * value).toFixed(1)) + THIN + "%",
    seconds: (value) => value < 0.1 ? (1000 * value).toFixed(0) + THIN + "ms"
      : value < 120 ? value.toFixed(1) + THIN + "s"
      : value < 7200 ? (value / 60).toFixed(0) + THIN + "min" : (value / 3600).toFixed(1) + THIN + "h",
    bytes: (value) => {
      for (const unit of ["B", "kB", "MB", "GB"]) {
        if (value < 1000) return value.toFixed(unit === "B" ? 0 : 1) + THIN + unit;
        value /= 1000;
      }
      return value.toFixed(1) + THIN + "TB";
    },
  };
  const FIXED = new Set(["number", "signed", "percent", "seconds"]);
  const written = (value, kind, digits = null) => value === null || value === undefined ? NONE
    : digits !== null && FIXED.has(kind) ? exact(value, kind, digits) : kind in forms ? forms[kind](value) : String(value);

  window.written = written; // for whoever checks that both languages write numbers alike

  // Whoever must do something when the window changes, and before and after printing.
  const fits = [], prints = [];
  let printing = false;

  // Tables -----------------------------------------------------------------------------------------------------------
  const compare = (a, b) => typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });

  function table(host) {
    const { title, columns, rows, details, faint } = data.tables[host.dataset.table];
    const state = { first: 0, column: -1, down: false, words: "", size: PAGE };
    const body = make("tbody", { role: "rowgroup" }), where = make("span", { class: "where", "aria-live": "polite" });
    const back = make("button", { type: "button", "aria-label": `Previous rows of ${title}` }, "Previous");
    const on = make("button", { type: "button", "aria-label": `Next rows of ${title}` }, "Next");
    const heads = columns.map((column, j) => {
      const button = make("button", { type: "button" }, column.name);
      const head = make("th", { scope: "col", role: "columnheader", class: RIGHT.has(column.kind) ? "right" : "" }, button);
      button.addEventListener("click", () => {
        state.down = state.column === j ? !state.down : RIGHT.has(column.kind);
        state.column = j; state.first = 0; draw();
      });
      return head;
    });
    const chosen = () => {
      let order = rows.map((_, i) => i);
      if (state.words) {
        order = order.filter((i) => (rows[i].join(" ") + " " + (details ? details[i].text : "")).toLowerCase().includes(state.words));
      }
      if (state.column >= 0) {
        const j = state.column, sign = state.down ? -1 : 1;
        order.sort((a, b) => {
          const x = rows[a][j], y = rows[b][j];
          if (x === null || y === null) return (x === null) - (y === null); // what is not known stands last
          return sign * compare(x, y);
        });
      }
      return order;
    };
    function draw() {
      const order = chosen();
      heads.forEach((head, j) => {
        if (j === state.column) head.setAttribute("aria-sort", state.down ? "descending" : "ascending");
        else head.removeAttribute("aria-sort");
      });
      body.replaceChildren(...order.slice(state.first, state.first + state.size).flatMap((i) => line(i)));
      if (!order.length) body.append(make("tr", {}, make("td", { colspan: String(columns.length + (details ? 1 : 0)) }, "Nothing matches.")));
      const last = Math.min(state.first + state.size, order.length);
      where.textContent = order.length ? `${forms.integer(state.first + 1)}–${forms.integer(last)} of ${forms.integer(order.length)}` : "0";
      back.disabled = state.first === 0; on.disabled = last >= order.length;
    }
    function line(i) {
      const cells = columns.map((column, j) => cell(rows[i][j], column, j === 0, faint && faint[i].includes(j), Boolean(details)));
      const row = make("tr", { class: "data", role: "row" }, ...cells);
      if (!details) return [row];
      const button = make("button", { type: "button", "aria-expanded": "false", "aria-label": `Open ${rows[i][1] ?? rows[i][0]}` }, "+");
      const under = make("tr", { class: "detail", role: "row", hidden: "" }, make("td", { role: "cell", colspan: String(columns.length + 1) }));
      button.addEventListener("click", () => {
        const open = under.hidden;
        under.hidden = !open; button.textContent = open ? "−" : "+"; button.setAttribute("aria-expanded", String(open));
        if (open && !under.firstChild.hasChildNodes()) under.firstChild.append(...detail(details[i]));
      });
      row.prepend(make("td", { class: "open", role: "cell" }, button));
      return [row, under];
    }
    back.addEventListener("click", () => { state.first -= PAGE; draw(); });
    on.addEventListener("click", () => { state.first += PAGE; draw(); });
    const tools = make("div", { class: "tools" });
    if (rows.length > PAGE) {
      const search = make("input", { type: "search", placeholder: "Search these rows", "aria-label": `Search in ${title}` });
      search.addEventListener("input", () => { state.words = search.value.toLowerCase(); state.first = 0; draw(); });
      tools.append(search, back, on, where);
    }
    const opener = details ? [make("td", { class: "open", role: "cell" }, make("span", { class: "aside" }, "Open"))] : [];
    const head = make("thead", { role: "rowgroup" }, make("tr", { role: "row" }, ...opener, ...heads));
    const whole = make("table", { role: "table" }, make("caption", { class: "aside" }, title), head, body);
    draw();
    host.replaceChildren(...(rows.length > PAGE ? [tools] : []), make("div", { class: "scroll", role: "region", "aria-label": title }, whole));
    // A table that is wider than its place becomes a list of its rows, each with the names of its values.
    const fit = () => {
      if (printing || !host.offsetParent) return;
      host.classList.remove("stacked");
      host.classList.toggle("stacked", whole.scrollWidth > whole.parentElement.clientWidth + 1);
    };
    fits.push(fit); fit();
    let kept = null;
    prints.push((begins) => {
      if (begins) { kept = { ...state }; state.first = 0; state.size = rows.length; state.words = ""; host.classList.remove("stacked"); }
      else if (kept) Object.assign(state, kept);
      draw();
      if (!begins) fit();
    });
    back.addEventListener("click", fit); on.addEventListener("click", fit);
  }

  // opens: the row can be opened to read its texts whole, so that a long one may be cut.
  function cell(value, { name, kind, digits }, first, faint, opens) {
    const right = RIGHT.has(kind), text = written(value, kind, digits);
    const signs = kind === "signed" && /[1-9]/.test(text);
    const classes = [right ? "right" : "", kind === "id" ? "id" : "", faint ? "faint" : signs && value > 0 ? "up" : signs && value < 0 ? "down" : ""];
    if (kind === "text") classes.push(text.length > 40 ? "long" : text.length <= 20 ? "short" : "");
    const content = opens && !right && text.length > 60 ? make("span", { class: "clip", title: text.slice(0, 400) }, text) : text;
    const about = { class: classes.filter(Boolean).join(" "), "data-name": name };
    if (faint) about.title = "within its noise";
    return first && !right ? make("th", { ...about, scope: "row", role: "rowheader" }, content) : make("td", { ...about, role: "cell" }, content);
  }

  function detail(found) {
    const parts = [make("h4", { class: "aside" }, "Problem"), make("pre", { tabindex: "0" }, found.text)];
    if (found.facts && found.facts.length) {
      parts.push(make("dl", { class: "facts" }, ...found.facts.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)])));
    }
    for (const rollout of found.rollouts || []) {
      parts.push(make("div", { class: "rollout" + (rollout.reward > 0 ? " paid" : "") },
        make("p", {}, `Rollout ${rollout.number}, reward ${rollout.reward}`), make("pre", { tabindex: "0" }, rollout.text)));
    }
    return parts;
  }

  // Figures ----------------------------------------------------------------------------------------------------------
  const dark = () => {
    if (printing) return false;
    const set = document.documentElement.dataset.theme;
    return set ? set === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  };
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const themed = (layout) => {
    const axis = (own) => ({ ...own, gridcolor: colour("--grid"), zerolinecolor: colour("--soft"), linecolor: colour("--line"), tickcolor: colour("--line") });
    return {
      ...layout, xaxis: axis(layout.xaxis), yaxis: axis(layout.yaxis),
      font: { ...layout.font, color: colour("--ink") },
      hoverlabel: { bgcolor: colour("--card"), bordercolor: colour("--line"), font: { color: colour("--ink") }, align: "left" },
    };
  };
  const drawn = new Set();
  const options = { responsive: true, displayModeBar: matchMedia("(hover: hover) and (min-width: 700px)").matches ? "hover" : false, displaylogo: false, showSendToCloud: false, modeBarButtonsToRemove: ["sendChartToCloud", "sendDataToCloud", "lasso2d", "select2d", "autoScale2d"] };
  // On the dark ground, colours that are too dark are mixed with white until their contrast (WCAG 2.2) is 2.6.
  const LEAST = 2.6, NARROW = 500, FEW = 3, LEGEND_LINE = 20;
  const parts = (text) => [1, 3, 5].map((i) => parseInt(text.slice(i, i + 2), 16));
  const luminance = (rgb) => rgb.map((part) => part / 255)
    .map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
    .reduce((sum, part, i) => sum + [0.2126, 0.7152, 0.0722][i] * part, 0);
  const readable = (text) => {
    if (typeof text !== "string" || !/^#[0-9a-f]{6}$/i.test(text) || !dark()) return text;
    const ground = luminance(parts(colour("--card"))) + 0.05;
    for (let share = 0; ; share += 0.04) {
      const mixed = parts(text).map((part) => Math.round((1 - share) * part + 255 * share));
      if ((luminance(mixed) + 0.05) / ground >= LEAST) return "#" + mixed.map((part) => part.toString(16).padStart(2, "0")).join("");
    }
  };
  // The traces of a figure as the theme and its width want them; what its legend was used to hide stays hidden.
  const traces = (host) => data.figures[host.dataset.figure].data.map((trace, i) => {
    const own = { ...trace, visible: host.data?.[i]?.visible ?? true };
    for (const part of ["marker", "line"]) if (own[part]) own[part] = { ...own[part], color: readable(own[part].color) };
    if (own.type === "heatmap" && own.texttemplate && !printing) {
      own.showscale = host.clientWidth >= NARROW;
      if (!own.showscale) own.textfont = { size: 9 };
    }
    return own;
  });
  function plot(host) {
    const { layout } = data.figures[host.dataset.figure];
    const named = traces(host).filter((trace) => trace.showlegend !== false).length;
    // In a narrow window a legend has a line for each name, which would take the figure's own room.
    host.style.height = "";
    if (layout.showlegend && host.clientWidth < NARROW && named > FEW) host.style.height = `${host.clientHeight + LEGEND_LINE * (named - FEW)}px`;
    drawn.add(host);
    Plotly.newPlot(host, traces(host), themed(layout), options).then(() => { host.dataset.drawn = "yes"; });
  }

  const hosts = [...document.querySelectorAll("[data-figure]")];
  for (const host of hosts) host.classList.add(data.figures[host.dataset.figure].size);
  const sight = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) { sight.unobserve(entry.target); plot(entry.target); }
  }, { rootMargin: "300px" });
  for (const host of hosts) sight.observe(host);
  // Paper: whole tables, figures as wide as the page in light colours, what is folded opened; then everything back.
  const PAPER = 640, root = document.documentElement;
  addEventListener("beforeprint", () => {
    printing = true; root.classList.add("printing");
    for (const one of document.querySelectorAll("details.folded")) { one.dataset.was = one.open ? "open" : ""; one.open = true; }
    for (const host of document.querySelectorAll("[data-table]")) if (!host.hasChildNodes() && !host.closest("details.numbers")) table(host);
    for (const one of prints) one(true);
    for (const host of hosts) {
      sight.unobserve(host); drawn.add(host);
      const { layout } = data.figures[host.dataset.figure];
      Plotly.react(host, traces(host), { ...themed(layout), width: PAPER, height: host.clientHeight || 380 }, { ...options, responsive: false, displayModeBar: false });
      host.dataset.drawn = "yes";
    }
  });
  addEventListener("afterprint", () => {
    printing = false; root.classList.remove("printing");
    for (const one of document.querySelectorAll("details.folded")) one.open = one.dataset.was === "open";
    for (const one of prints) one(false);
    for (const host of hosts) { Plotly.purge(host); plot(host); }
  });
  let waits = 0;
  addEventListener("resize", () => { clearTimeout(waits); waits = setTimeout(() => { for (const fit of fits) fit(); }, 100); });

  for (const host of document.querySelectorAll("[data-table]")) {
    const around = host.closest("details");
    if (around) around.addEventListener("toggle", () => { if (!host.hasChildNodes()) table(host); else for (const fit of fits) fit(); });
    else table(host);
  }

  // Theme and navigation ---------------------------------------------------------------------------------------------
  const toggle = document.getElementById("theme");
  const retheme = () => {
    toggle.textContent = dark() ? "Light" : "Dark";
    toggle.setAttribute("aria-label", `Change to the ${dark() ? "light" : "dark"} theme`);
    toggle.setAttribute("aria-pressed", String(dark()));
    for (const host of drawn) Plotly.react(host, traces(host), themed(data.figures[host.dataset.figure].layout), options);
  };
  toggle.addEventListener("click", () => {
    const next = dark() ? "light" : "dark";
    document.documentElement.dataset.theme = next;
    try { localStorage.setItem("theme", next); } catch (e) { /* a page from a file may keep nothing */ }
    retheme();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", retheme);
  retheme();

  const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
  const near = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) {
      for (const link of links.values()) link.removeAttribute("aria-current");
      links.get(entry.target.id)?.setAttribute("aria-current", "true");
    }
  }, { rootMargin: "-10% 0px -80% 0px" });
  for (const section of document.querySelectorAll("main > section")) near.observe(section);
  document.documentElement.dataset.ready = "yes";
})();
