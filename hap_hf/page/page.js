(() => {
  "use strict";
  const data = JSON.parse(document.getElementById("data").textContent);
  const points = data.points;
  const SVG = "http://www.w3.org/2000/svg";
  const byId = (id) => document.getElementById(id);

  // Everything that comes from the data is set as text or as an attribute, and never as markup.
  function element(name, attributes = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }
  function drawn(name, attributes = {}, ...children) {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }

  const missing = "–";
  const percent = (x, digits = 0) => (x == null ? missing : `${(100 * x).toFixed(digits)}%`);
  const isTiny = (x) => x !== 0 && Math.abs(x) < 1e-3;
  const plain = (x) => (x == null ? missing : isTiny(x) ? x.toExponential(1) : String(Number(x.toPrecision(4))));
  const whole = (x) => (x == null ? missing : Math.round(x).toLocaleString("en-US"));
  function short(x) {
    if (x == null) return missing;
    for (const [size, letter] of [[1e12, " T"], [1e9, " G"], [1e6, " M"], [1e3, " k"]])
      if (Math.abs(x) >= size) return plain(x / size) + letter;
    return plain(x);
  }
  const isShare = data.metric !== "loss" && points.every((p) => p.value != null && p.value >= 0 && p.value <= 1);
  const valued = (x) => (isShare ? percent(x, 1) : plain(x));
  const amount = (p) => (p === points[0] ? "dense" : percent(p.keep, Number.isInteger(Math.round(1e4 * p.keep) / 100) ? 0 : 1));

  // The slider goes from what keeps least to the dense model, so that right is larger.
  const order = points.map((_, i) => i).sort((a, b) => points[a].keep - points[b].keep);
  const slider = byId("keep");
  slider.max = String(points.length - 1);
  for (const i of order) byId("ticks").append(element("span", {}, amount(points[i])));

  const updates = [];
  let current = null;
  function choose(index, remember) {
    current = index;
    slider.value = String(order.indexOf(index));
    const said = index === 0 ? "all, the dense model" : `${amount(points[index])} of ${data.counted_in}`;
    byId("said").textContent = said;
    slider.setAttribute("aria-valuetext", said);
    [...byId("ticks").children].forEach((tick, i) => tick.classList.toggle("now", order[i] === index));
    for (const update of updates) update(points[index], index);
    document.querySelectorAll(".numbers tbody tr").forEach((row, i) => row.classList.toggle("now", i === index));
    if (remember) history.replaceState(null, "", `#keep=${points[index].keep}`);
  }
  slider.addEventListener("input", () => choose(order[Number(slider.value)], true));

  // Facts.
  updates.push((p, index) => {
    const dense = points[0];
    const part = (now, before) => (index && before ? `${percent(now / before)} of ${short(before)}` : "as it is");
    const rows = [
      ["parameters", short(p.params), part(p.params, dense.params)],
      ["multiply-accumulates", short(p.macs), part(p.macs, dense.macs)],
    ];
    if (p.milliseconds != null)
      rows.push(["milliseconds a batch", plain(p.milliseconds), part(p.milliseconds, dense.milliseconds)]);
    if (data.metric !== "loss") rows.push([data.metric, valued(p.value), `dense: ${valued(dense.value)}`]);
    rows.push(["loss", plain(p.loss), `dense: ${plain(dense.loss)}`]);
    byId("facts").replaceChildren(...rows.map(([name, value, small]) =>
      element("div", {}, element("dt", {}, name), element("dd", {}, value, element("small", {}, small)))));
    byId("take").replaceChildren(...(index
      ? ["To have this model: ", element("code", {}, "hap-hf prune"), " with the words of this sweep, and ",
        element("code", {}, `${data.flag} ${p.keep}`), "."]
      : ["Nothing is removed. Move the slider to the left to see what smaller models would be."]));
  });

  // Curves.
  const box = { width: 320, height: 236, left: 52, right: 14, top: 28, bottom: 44 };
  function nice(low, high, count) {
    const rough = (high - low) / count || 1;
    const unit = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((f) => f * unit).find((s) => s >= rough);
    const found = [];
    for (let t = Math.ceil(low / step - 1e-9); t * step <= high * (1 + 1e-9); t++) found.push(t * step);
    return found;
  }
  function chart(label, x, xFormat, title, y, yFormat) {
    const xs = points.map(x), ys = points.map(y), high = Math.max(...xs) * 1.06 || 1;
    const middle = (Math.max(...ys) + Math.min(...ys)) / 2;
    // Without a least range, noise in the last digit would look like a cliff.
    const room = 0.6 * Math.max(Math.max(...ys) - Math.min(...ys), 0.1 * Math.abs(ys[0]), 1e-6);
    const bottom = Math.min(...ys) >= 0 ? Math.max(0, middle - room) : middle - room, top = middle + room;
    const toX = (v) => box.left + (v / high) * (box.width - box.left - box.right);
    const toY = (v) => box.height - box.bottom - ((v - bottom) / (top - bottom)) * (box.height - box.top - box.bottom);
    const described = `${title} against ${label}: ${yFormat(ys[0])} at ${xFormat(xs[0])} for the dense model`;
    const svg = drawn("svg", { viewBox: `0 0 ${box.width} ${box.height}`, role: "img", "aria-label": described });
    const yTicks = nice(bottom, top, 5);
    const onAxis = (v) => (yFormat === valued && isShare && yTicks[1] - yTicks[0] >= 0.01 ? percent(v) : yFormat(v));
    for (const v of yTicks) {
      svg.append(drawn("line", { class: "grid", x1: box.left, x2: box.width - box.right, y1: toY(v), y2: toY(v) }));
      svg.append(drawn("text", { x: box.left - 6, y: toY(v) + 4, "text-anchor": "end" }, onAxis(v)));
    }
    for (const v of nice(0, high, 4)) {
      svg.append(drawn("line", { class: "grid", x1: toX(v), x2: toX(v), y1: box.top, y2: box.height - box.bottom }));
      svg.append(drawn("text", { x: toX(v), y: box.height - box.bottom + 18, "text-anchor": "middle" }, xFormat(v)));
    }
    svg.append(drawn("text", { class: "title", x: box.left, y: 14 }, title));
    svg.append(drawn("text", { x: box.width - box.right, y: box.height - 6, "text-anchor": "end" }, label));
    const line = [...order].reverse().map((i) => `${toX(xs[i])},${toY(ys[i])}`).join(" ");
    svg.append(drawn("polyline", { class: "path", points: line }));
    const across = drawn("line", { class: "cross", x1: box.left, x2: box.left, y1: 0, y2: 0 });
    const upward = drawn("line", { class: "cross", x1: 0, x2: 0, y1: box.height - box.bottom, y2: 0 });
    const ring = drawn("circle", { class: "ring", r: 9 });
    svg.append(across, upward, ring);
    points.forEach((p, i) => {
      const tip = drawn("title", {}, `${amount(p)}: ${yFormat(ys[i])}, ${xFormat(xs[i])} ${label}`);
      const mark = i === 0
        ? drawn("rect", { class: "point dense", x: toX(xs[i]) - 4.5, y: toY(ys[i]) - 4.5, width: 9, height: 9 }, tip)
        : i === data.chosen
          ? drawn("path", { class: "point star", d: star(toX(xs[i]), toY(ys[i]), 8) }, tip)
          : drawn("circle", { class: "point", cx: toX(xs[i]), cy: toY(ys[i]), r: 4.2 }, tip);
      mark.addEventListener("click", () => choose(i, true));
      svg.append(mark);
    });
    updates.push((p, i) => {
      const [at, up] = [toX(xs[i]), toY(ys[i])];
      for (const [line, key, value] of [[across, "x2", at], [across, "y1", up], [across, "y2", up], [upward, "x1", at],
        [upward, "x2", at], [upward, "y2", up], [ring, "cx", at], [ring, "cy", up]]) line.setAttribute(key, value);
    });
    byId("charts").append(element("figure", {}, svg));
  }
  function star(x, y, r) {
    const corners = Array.from({ length: 10 }, (_, i) => {
      const angle = (Math.PI * i) / 5 - Math.PI / 2, far = i % 2 ? r * 0.45 : r;
      return `${(x + far * Math.cos(angle)).toFixed(2)},${(y + far * Math.sin(angle)).toFixed(2)}`;
    });
    return `M${corners.join("L")}Z`;
  }
  chart("parameters", (p) => p.params, short, data.metric, (p) => p.value, valued);
  chart("multiply-accumulates", (p) => p.macs, short, data.metric, (p) => p.value, valued);
  if (points.every((p) => p.milliseconds != null))
    chart("milliseconds a batch", (p) => p.milliseconds, plain, data.metric, (p) => p.value, valued);
  if (data.metric !== "loss") chart("parameters", (p) => p.params, short, "loss", (p) => p.loss, plain);
  const key = (name, attributes, word) => element("span", {}, drawnKey(name, attributes), word);
  function drawnKey(name, attributes) {
    const svg = drawn("svg", { width: 18, height: 18, viewBox: "0 0 18 18", "aria-hidden": "true" }, drawn(name, attributes));
    svg.style.setProperty("width", "18px");
    return svg;
  }
  byId("curves-legend").append(
    key("rect", { class: "point dense", x: 4.5, y: 4.5, width: 9, height: 9 }, "dense"),
    key("circle", { class: "point", cx: 9, cy: 9, r: 4.2 }, "pruned"),
    key("circle", { class: "ring", cx: 9, cy: 9, r: 7 }, "shown here"));
  if (data.chosen != null)
    byId("curves-legend").append(key("path", { class: "star", d: star(9, 9, 8) },
      `smallest that loses at most 2% of the dense model's ${data.metric}`));

  // Heads: a row for each layer, and a cell for each head.
  const letter = { k: "kept", i: "an implant", p: "removed" };
  const layers = data.groups.map((g, i) => [g, i]).filter(([g]) => g.kind === "heads" && g.sensitivity.length);
  if (layers.length) {
    byId("section-heads").hidden = false;
    const every = layers.flatMap(([g]) => g.sensitivity).filter((v) => v > 0);
    const least = Math.log(Math.min(...every)), most = Math.log(Math.max(...every));
    const shade = (v) => (v > 0 ? Math.min(6, Math.floor((7 * (Math.log(v) - least)) / (most - least || 1))) : 0);
    const columns = Math.max(...layers.map(([g]) => g.units));
    const head = element("tr", {}, element("th", { scope: "col" }, element("span", { class: "hidden" }, "layer")));
    for (let unit = 0; unit < columns; unit++) head.append(element("th", { scope: "col" }, String(unit)));
    const body = element("tbody"), cells = [];
    layers.forEach(([group, index], row) => {
      const line = element("tr", {}, element("th", { scope: "row" }, group.label));
      cells.push(group.sensitivity.map((value, unit) => {
        const inner = element("span"), cell = element("td", { tabindex: row || unit ? -1 : 0, class: `s${shade(value)}` }, inner);
        updates.push((p, at) => {
          const what = at ? p.heads[index][unit] : "k";
          inner.textContent = { k: "", i: "i", p: "×" }[what];
          cell.className = `s${shade(value)} ${{ k: "stays", i: "implant", p: "gone" }[what]}`;
          const error = group.error.length ? ` ± ${plain(group.error[unit])}` : "";
          cell.setAttribute("aria-label", `${group.label}, head ${unit}: ${letter[what]}, sensitivity ${plain(value)}${error}`);
        });
        const tell = () => { byId("head").textContent = cell.getAttribute("aria-label"); };
        cell.addEventListener("focus", tell);
        cell.addEventListener("mouseenter", tell);
        cell.addEventListener("keydown", (event) => {
          const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
          const next = move && cells[row + move[0]]?.[unit + move[1]];
          if (!next) return;
          event.preventDefault();
          cell.setAttribute("tabindex", -1);
          next.setAttribute("tabindex", 0);
          next.focus();
        });
        line.append(cell);
        return cell;
      }));
      body.append(line);
    });
    byId("heads").append(element("table", { class: "heads", "aria-label": "heads by layer" }, element("thead", {}, head), body));
    const scale = Array.from({ length: 7 }, (_, i) => element("i", { class: `s${i}` }));
    byId("heads-legend").append(
      element("span", {}, plain(Math.exp(least)), ...scale, ` ${plain(Math.exp(most))}: rise of the loss without the head`),
      element("span", {}, "full square: kept"), element("span", {}, "small, ×: removed"));
    if (points.some((p) => Object.values(p.heads).some((h) => h.includes("i"))))
      byId("heads-legend").append(element("span", {}, "i: implant"));
  }

  // Widths: a list for each kind of units.
  const kinds = { heads: "heads", ffn: "neurons", channels: "channels" };
  for (const [kind, word] of Object.entries(kinds)) {
    const members = data.groups.map((g, i) => [g, i]).filter(([g]) => g.kind === kind);
    if (!members.length) continue;
    byId("section-widths").hidden = false;
    const title = element("h3"), list = element("div", {}, title);
    const total = members.reduce((sum, [g]) => sum + g.units, 0), largest = Math.max(...members.map(([g]) => g.units));
    updates.push((p, at) => {
      const kept = members.reduce((sum, [g, i]) => sum + (at ? p.widths[i][0] : g.units), 0);
      title.textContent = `${word}: ${whole(kept)} of ${whole(total)}`;
    });
    for (const [group, index] of members) {
      const kept = element("span", { class: "kept" }), implants = element("span", { class: "implants" });
      const number = element("span", { class: "number" }), bar = element("div", { class: "bar", "aria-hidden": "true" }, kept, implants);
      bar.style.setProperty("width", `${Math.max(8, (100 * group.units) / largest)}%`);
      // The name is cut at its beginning where it is long, and marks keep its order.
      const name = element("span", { class: "name", title: group.name }, `\u200e${group.label}\u200e`);
      list.append(element("div", { class: "row" }, name, bar, number));
      updates.push((p, at) => {
        const [stay, cheap] = at ? p.widths[index] : [group.units, 0];
        kept.style.setProperty("width", `${(100 * stay) / group.units}%`);
        implants.style.setProperty("width", `${(100 * cheap) / group.units}%`);
        number.textContent = `${whole(stay)}${cheap ? `+${whole(cheap)}` : ""} of ${whole(group.units)}`;
      });
    }
    byId("widths").append(list);
  }

  function fromAddress() {
    const wanted = Number(/[#&]keep=([0-9.eE+-]+)/.exec(location.hash)?.[1] ?? NaN);
    const start = data.chosen ?? Math.min(1, points.length - 1);
    const distance = (i) => Math.abs(points[i].keep - wanted);
    choose(Number.isFinite(wanted) ? order.reduce((best, i) => (distance(i) < distance(best) ? i : best)) : start, false);
  }
  window.addEventListener("hashchange", fromAddress);
  fromAddress();
  document.documentElement.dataset.ready = String(current);
})();
