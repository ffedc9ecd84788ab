// Values under the pointer and a part drawn larger, over the drawings that the page has without scripts.
(() => {
  const data = JSON.parse(document.getElementById("curve-data").textContent);
  const figure = document.getElementById("chart"), readout = document.getElementById("readout");
  const axis = data.beside ?? "step";
  const NS = "http://www.w3.org/2000/svg", LOG = "gnorm";
  const NAMES = { loss: "loss", valid: "validation loss", gnorm: "gradient norm", lr: "learning rate", wps: "tokens/s", nodes: "nodes" };
  const sums = (steps) => { let at = 0; return steps.map((step) => (at += step)); };
  const lines = Object.fromEntries(Object.entries(data.lines).map(([name, all]) =>
    [name, all.map(([run, kept, steps, values]) => ({ run, kept, steps: sums(steps), values }))]));
  const attempts = data.attempts.map(([run, nodes, steps, times]) => ({ run, nodes, steps: sums(steps), times: sums(times) }));
  const charts = [...figure.querySelectorAll("svg.curves")].map((svg) => ({
    svg, left: +svg.dataset.left, inner: +svg.dataset.inner, strip: +svg.dataset.strip,
    panels: [...svg.querySelectorAll(".panel")].map((node) => ({
      node, name: node.dataset.measure, tall: +node.dataset.tall, whole: [...node.childNodes] })),
    names: svg.querySelector(".names"), steps: svg.querySelector(".steps"),
  }));
  for (const chart of charts) for (const part of [chart.names, chart.steps]) part.whole = [...part.childNodes];
  const whole = [data.first, data.last];
  let range = whole, at = null, from = null;

  // ---- numbers ----
  const digits = (value, n) => String(+value.toPrecision(n));
  const thousands = (value) => Math.round(value).toLocaleString("en-US");
  const shorter = (value) => Math.abs(value) >= 1000 ? `${digits(value / 1000, 6)}k` : digits(value, 6);
  const written = { loss: (v) => v.toFixed(3), valid: (v) => v.toFixed(3), gnorm: (v) => digits(v, 3),
    lr: (v) => v ? v.toExponential(3).replace("e-", "e−") : "0", wps: thousands, nodes: String };
  const below = (steps, step) => { // index of the last one at or below `step`, -1 if there is none
    let low = 0, high = steps.length;
    while (low < high) { const mid = (low + high) >> 1; if (steps[mid] <= step) low = mid + 1; else high = mid; }
    return low - 1;
  };
  function nearest(line, step) {
    const i = Math.max(0, below(line.steps, step));
    return i + 1 < line.steps.length && line.steps[i + 1] - step < step - line.steps[i] ? i + 1 : i;
  }
  // The line that the present weights come from: the newest that covers the step.
  const covering = (all, step) => all.findLast((line) => line.kept !== 0 && line.steps[0] <= step && line.steps.at(-1) >= step);

  function moment(attempt, step) {
    const i = Math.min(Math.max(0, below(attempt.steps, step)), Math.max(0, attempt.steps.length - 2)), j = Math.min(i + 1, attempt.steps.length - 1);
    const share = j > i ? (step - attempt.steps[i]) / (attempt.steps[j] - attempt.steps[i]) : 0;
    const seconds = attempt.times[i] + share * (attempt.times[j] - attempt.times[i]);
    return new Date(1000 * seconds).toISOString().slice(0, 16).replace("T", " ");
  }

  function values(step) {
    const found = [[axis, thousands(step)]];
    const attempt = covering(attempts, step);
    if (attempt) found.push(["time", `${moment(attempt, step)} UTC`], ["run", data.runs[attempt.run]]);
    for (const [name, all] of Object.entries(lines)) {
      if (data.beside) { // two lineages: the value of each
        for (const line of all.filter((each) => each.steps[0] <= step && each.steps.at(-1) >= step))
          found.push([`${NAMES[name]} of ${data.runs[line.run]}`, written[name](line.values[nearest(line, step)])]);
        continue;
      }
      const line = covering(all, step);
      if (name === "nodes") { if (attempt?.nodes) found.push(["nodes", attempt.nodes]); }
      else if (line) {
        // Where there are several, the values stand in the order of their letters.
        const several = name === "valid" ? all.filter((one) => one.kept && one.steps[0] < step && one.steps.at(-1) >= step) : [];
        const told = (several.length ? several : [line]).map((one) => written[name](one.values[nearest(one, step)]));
        found.push([NAMES[name], told.join(" · ")]);
      }
    }
    return found;
  }

  // ---- the pointer ----
  function make(name, attributes, text) {
    const node = document.createElementNS(NS, name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    return node;
  }
  const across = (chart, step) => chart.left + chart.inner * (step - range[0]) / (range[1] - range[0]);
  for (const chart of charts) {
    const tall = chart.svg.viewBox.baseVal.height;
    chart.area = make("rect", { class: "selected", y: chart.strip, height: tall - chart.strip - 40, hidden: "" });
    chart.cursor = make("path", { class: "cursor", d: "", hidden: "" });
    chart.svg.append(chart.area, chart.cursor);
    chart.draw = (step) => { const x = across(chart, step); chart.cursor.setAttribute("d", `M${x.toFixed(1)} ${chart.strip}V${tall - 40}`); };
  }
  function point(step) {
    at = step === null ? null : Math.min(range[1], Math.max(range[0], Math.round(step)));
    for (const chart of charts) {
      chart.cursor.toggleAttribute("hidden", at === null);
      if (at !== null) chart.draw(at);
    }
    const told = at === null ? [[axis, `${thousands(range[0])} to ${thousands(range[1])}`]] : values(at);
    readout.replaceChildren(...told.map(([name, value]) => {
      const part = document.createElement("span"), label = document.createElement("i");
      label.textContent = name;
      part.append(label, ` ${value}`);
      return part;
    }), back);
    back.hidden = range === whole;
  }
  const back = document.createElement("button");
  back.type = "button"; back.id = "zoom-out"; back.textContent = "Whole run";
  back.addEventListener("click", () => zoom(...whole));
  const stepAt = (chart, event) => {
    const box = chart.svg.getBoundingClientRect();
    const x = (event.clientX - box.left) * chart.svg.viewBox.baseVal.width / box.width;
    return Math.min(range[1], Math.max(range[0], range[0] + (x - chart.left) / chart.inner * (range[1] - range[0])));
  };

  // ---- zoom ----
  function ticks(low, high, most, sizes = [1, 2, 5]) {
    const least = (high - low) / most, power = Math.floor(Math.log10(least));
    const size = [0, 1].flatMap((more) => sizes.map((each) => each * 10 ** (power + more))).find((each) => each >= least * (1 - 1e-9));
    const found = [];
    for (let i = Math.ceil(low / size - 1e-9); i * size <= high + size * 1e-9; i++) found.push(+(i * size).toPrecision(12));
    return found;
  }
  function part(line) { // the points of a line within the range, and one more on both sides
    const first = Math.max(0, below(line.steps, range[0])), last = Math.min(line.steps.length, below(line.steps, range[1]) + 2);
    return line.steps.slice(first, last).map((step, i) => [step, line.values[first + i]]);
  }
  function drawPanel(chart, panel) {
    const parts = lines[panel.name].filter((line) => line.steps[0] <= range[1] && line.steps.at(-1) >= range[0]).map((line) => [line, part(line)]);
    const all = parts.flatMap(([, points]) => points.filter(([step]) => step >= range[0] && step <= range[1]).map(([, value]) => value));
    if (!all.length) return panel.node.replaceChildren(panel.whole[0]);
    const log = panel.name === LOG, f = log ? (v) => Math.log10(Math.max(v, 1e-9)) : (v) => v;
    let low = Math.min(...all.map(f)), high = Math.max(...all.map(f));
    if (panel.name === "wps") { low = 0; high = Math.max(high, data.healthy ?? 0); }
    const room = (high - low) * 0.08 || Math.abs(high) * 0.1 || 1;
    [low, high] = [panel.name === "wps" ? 0 : low - room, high + room];
    const x = (step) => (across(chart, step) - chart.left).toFixed(1);
    const y = (value) => (panel.tall * (1 - (f(value) - low) / (high - low))).toFixed(1);
    const made = [panel.whole[0]];
    const marked = log ? ticks(10 ** low, 10 ** high, 4) : ticks(low, high, panel.tall > 150 ? 5 : 3);
    for (const value of marked.filter((v) => (panel.name !== "nodes" || Number.isInteger(v)) && (!log || v > 0))) {
      made.push(make("path", { class: "grid", d: `M0 ${y(value)}H${chart.inner}` }));
      made.push(make("text", { x: -6, y: y(value), dy: 4, "text-anchor": "end" }, panel.name === "lr" && value ? value.toExponential() : shorter(value)));
    }
    const inside = make("svg", { width: chart.inner, height: panel.tall });
    for (const [, step, , quiet] of data.marks.filter(([, step]) => step >= range[0] && step <= range[1]))
      inside.append(make("path", { class: quiet ? "at quiet" : "at", d: `M${x(step)} 0V${panel.tall}` }));
    if (panel.name === "wps" && data.healthy) inside.append(make("path", { class: "level", d: `M0 ${y(data.healthy)}H${chart.inner}` }));
    for (const [line, points] of parts.sort(([a], [b]) => a.kept - b.kept)) {
      const path = points.map(([step, value]) => `${x(step)} ${y(value)}`).join(" ");
      inside.append(make("path", { class: `line run-${line.run % data.colors}${line.kept ? "" : " gone"}`, d: `M${path}${points.length === 1 ? "h0" : ""}` }));
    }
    made.push(inside);
    panel.node.replaceChildren(...made);
  }
  function drawNames(chart) {
    let free = -Infinity;
    chart.names.replaceChildren();
    for (const [name, step] of data.marks.filter(([, step]) => step >= range[0] && step <= range[1])) {
      const x = across(chart, step) - chart.left;
      chart.names.append(make("path", { class: "stem", d: `M${x.toFixed(1)} ${chart.strip - 8}V${chart.strip}` }));
      if (x < free) continue;
      free = x + 40;
      const link = make("a", { href: `#${name}` });
      link.append(make("text", { x: (x > chart.inner - 30 ? x - 30 : x + 5).toFixed(1), y: chart.strip - 4 }, name.slice(name.lastIndexOf("-") + 1)));
      chart.names.append(link);
    }
  }
  function drawSteps(chart) {
    const marked = ticks(...range, Math.max(4, chart.inner / 100), [1, 2, 2.5, 5]).filter(Number.isInteger);
    chart.steps.replaceChildren(...marked.map((step) => make("text", { x: (across(chart, step) - chart.left).toFixed(1), y: 17, "text-anchor": "middle" }, thousands(step))), chart.steps.whole.at(-1));
  }
  function zoom(low, high) {
    low = Math.max(whole[0], Math.round(low)); high = Math.min(whole[1], Math.round(high));
    if (high - low < 4) return;
    range = low === whole[0] && high === whole[1] ? whole : [low, high];
    for (const chart of charts) {
      const parts = [chart.names, chart.steps, ...chart.panels];
      if (range === whole) for (const each of parts) (each.node ?? each).replaceChildren(...each.whole);
      else { chart.panels.forEach((panel) => drawPanel(chart, panel)); drawNames(chart); drawSteps(chart); }
    }
    figure.dataset.range = range.join(" ");
    point(null);
  }

  // ---- what a reader does ----
  for (const chart of charts) {
    chart.svg.addEventListener("pointerdown", (event) => { if (event.button === 0 && !event.target.closest("a")) from = stepAt(chart, event); });
    chart.svg.addEventListener("pointermove", (event) => {
      const step = stepAt(chart, event);
      point(step);
      const dragged = from !== null && Math.abs(across(chart, step) - across(chart, from)) > 4;
      chart.area.toggleAttribute("hidden", !dragged);
      if (!dragged) return;
      chart.svg.setPointerCapture(event.pointerId);
      chart.area.setAttribute("x", Math.min(across(chart, from), across(chart, step)));
      chart.area.setAttribute("width", Math.abs(across(chart, from) - across(chart, step)));
    });
    chart.svg.addEventListener("pointerup", (event) => {
      const step = stepAt(chart, event), begun = from;
      from = null;
      const dragged = !chart.area.hasAttribute("hidden");
      chart.area.setAttribute("hidden", "");
      if (dragged && begun !== null) zoom(Math.min(begun, step), Math.max(begun, step));
    });
    chart.svg.addEventListener("pointercancel", () => { from = null; chart.area.setAttribute("hidden", ""); });
    chart.svg.addEventListener("pointerleave", (event) => { if (from === null && document.activeElement !== figure) point(null); });
    chart.svg.addEventListener("dblclick", () => zoom(...whole));
  }
  figure.tabIndex = 0;
  figure.setAttribute("role", "group");
  figure.setAttribute("aria-label", "Curves: arrow keys move a line whose values are read out");
  readout.setAttribute("aria-live", "polite");
  figure.addEventListener("keydown", (event) => {
    const [low, high] = range, middle = at ?? (low + high) / 2, stride = Math.max(1, (high - low) / (event.shiftKey ? 20 : 200));
    const act = {
      ArrowLeft: () => point(middle - stride), ArrowRight: () => point(middle + stride), Home: () => point(low), End: () => point(high),
      Escape: () => zoom(...whole),
      "+": () => zoom(middle - (high - low) / 4, middle + (high - low) / 4), "-": () => zoom(middle - (high - low), middle + (high - low)),
    }[event.key];
    if (act) { event.preventDefault(); act(); if (at === null && !["Escape", "+", "-"].includes(event.key)) point(middle); }
  });
  for (const button of document.querySelectorAll("button.zoom")) {
    button.hidden = false;
    button.addEventListener("click", () => { zoom(+button.dataset.from, +button.dataset.to); document.getElementById("curves").scrollIntoView(); });
  }
  readout.hidden = false;
  document.getElementById("chart-help").hidden = false;
  point(null);
})();
