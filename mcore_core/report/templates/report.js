"use strict";
// Pointing at a picture shows the nearest recorded step and its value.
for (const svg of document.querySelectorAll("figure svg")) {
  const line = svg.querySelector(".line") || svg.querySelector(".eval");
  if (!line) continue;
  const [x0, x1] = svg.dataset.x.split(" ").map(Number);
  const [y0, y1] = svg.dataset.y.split(" ").map(Number);
  const [left, top, right, bottom] = svg.dataset.box.split(" ").map(Number);
  const points = line.getAttribute("points").split(" ").map((p) => p.split(",").map(Number));
  const make = (name, kind) => {
    const node = document.createElementNS(svg.namespaceURI, name);
    node.setAttribute("class", kind);
    node.style.display = "none";
    return svg.appendChild(node);
  };
  const cross = make("line", "cross"), probe = make("circle", "probe"), say = make("text", "say");
  const all = [cross, probe, say];
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    const [x, y] = points.reduce((a, b) => (Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a));
    const step = Math.round(x0 + ((x - left) / (right - left)) * (x1 - x0));
    const value = y0 + ((bottom - y) / (bottom - top)) * (y1 - y0);
    const set = (node, values) => Object.entries(values).forEach(([k, v]) => node.setAttribute(k, v));
    set(cross, { x1: x, x2: x, y1: top, y2: bottom });
    set(probe, { cx: x, cy: y, r: 4 });
    const late = x > (left + right) / 2;
    set(say, { x: x + (late ? -10 : 10), y: top + 12, "text-anchor": late ? "end" : "start" });
    say.textContent = `step ${step}: ${Number(value.toPrecision(4))}`;
    for (const node of all) node.style.display = "";
  });
  svg.addEventListener("pointerleave", () => all.forEach((node) => (node.style.display = "none")));
}
