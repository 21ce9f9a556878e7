"use strict";
// Charts work without this; it shows the nearest value under the pointer or by the arrow keys.
for (const box of document.querySelectorAll(".chartbox")) {
  const chart = box.querySelector("svg.chart");
  const points = JSON.parse(chart.dataset.points || "[]");
  if (!points.length) continue;
  const view = chart.viewBox.baseVal;
  const tip = Object.assign(document.createElement("div"), { className: "tip", hidden: true });
  tip.setAttribute("role", "status");
  const mark = document.createElementNS(chart.namespaceURI, "circle");
  mark.setAttribute("class", "mark");
  mark.setAttribute("r", "6");
  box.append(tip);
  box.tabIndex = 0;
  let chosen = -1;

  const show = (index) => {
    chosen = Math.max(0, Math.min(points.length - 1, index));
    const [x, y, text] = points[chosen];
    mark.setAttribute("cx", x);
    mark.setAttribute("cy", y);
    chart.append(mark);
    tip.textContent = text;
    tip.hidden = false;
    const width = box.clientWidth;
    const half = tip.offsetWidth / 2;
    tip.style.left = `${Math.max(half, Math.min(width - half, (x / view.width) * width))}px`;
    tip.style.top = `${Math.max(36, (y / view.height) * chart.clientHeight)}px`;
  };
  const hide = () => {
    mark.remove();
    tip.hidden = true;
    chosen = -1;
  };
  const nearest = (event) => {
    const frame = chart.getBoundingClientRect();
    const x = ((event.clientX - frame.left) / frame.width) * view.width;
    const y = ((event.clientY - frame.top) / frame.height) * view.height;
    const far = (point) => (point[0] - x) ** 2 + 0.25 * (point[1] - y) ** 2;
    return points.reduce((best, point, i) => (far(point) < far(points[best]) ? i : best), 0);
  };
  box.addEventListener("pointermove", (event) => show(nearest(event)));
  box.addEventListener("pointerleave", hide);
  box.addEventListener("blur", hide);
  box.addEventListener("keydown", (event) => {
    if (event.key === "ArrowRight") show(chosen + 1);
    else if (event.key === "ArrowLeft") show(chosen < 0 ? points.length - 1 : chosen - 1);
    else if (event.key === "Escape") hide();
    else return;
    event.preventDefault();
  });
}
