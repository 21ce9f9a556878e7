"use strict";
// The maps are whole without this. It adds: the picture and class of the point under the pointer or
// chosen by the arrow keys, ringed on both maps.
{
  const box = document.getElementById("feature-maps");
  const sprite = document.getElementById("feature-thumbnails");
  const columns = Number(box.dataset.columns);
  const SHOWN = 64; // pixels
  if (sprite) box.style.setProperty("--thumbnails", `url(${sprite.src})`);
  const maps = [...box.querySelectorAll(".mapbox")].map((frame) => {
    const svg = frame.querySelector("svg.map");
    const points = [...svg.querySelectorAll("path[data-i]")].map((path) => {
      const [x, y] = path.getAttribute("d").slice(1).split(/[ m]/, 2).map(Number);
      const label = path.querySelector("title").textContent;
      path.querySelector("title").remove(); // our own tip takes its place
      return { path, label, x, y, i: Number(path.dataset.i) };
    });
    const ring = document.createElementNS(svg.namespaceURI, "circle");
    ring.setAttribute("class", "ring");
    ring.setAttribute("r", "9");
    const tip = Object.assign(document.createElement("div"), { className: "tip", hidden: true });
    tip.setAttribute("role", "status");
    frame.append(tip);
    return { frame, svg, points, ring, tip, chosen: null };
  });

  const isShown = (point) => !point.path.closest(".off");

  const fill = (tip, point) => {
    const text = document.createElement("span");
    text.textContent = `${point.label}, picture ${point.i + 1}`;
    tip.replaceChildren(text);
    if (!sprite || !columns) return;
    const picture = Object.assign(document.createElement("span"), { className: "thumbnail" });
    picture.style.backgroundSize = `${columns * SHOWN}px auto`;
    const [row, column] = [Math.floor(point.i / columns), point.i % columns];
    picture.style.backgroundPosition = `${-column * SHOWN}px ${-row * SHOWN}px`;
    tip.prepend(picture);
  };

  const place = (map, point) => {
    const scale = map.svg.clientWidth / map.svg.viewBox.baseVal.width;
    const [x, y] = [point.x * scale, point.y * scale];
    const { offsetWidth: width, offsetHeight: height } = map.tip;
    const left = x + 14 + width > map.frame.clientWidth ? x - 14 - width : x + 14;
    map.tip.style.left = `${Math.max(0, left)}px`;
    map.tip.style.top = `${Math.max(0, Math.min(map.svg.clientHeight - height, y - height / 2))}px`;
  };

  const hide = () => {
    for (const map of maps) {
      map.ring.remove();
      map.tip.hidden = true;
      map.chosen = null;
    }
  };

  const show = (own, point) => {
    if (point === own.chosen) return;
    for (const map of maps) {
      const there = map.points.find((other) => other.i === point.i);
      map.ring.setAttribute("cx", there.x);
      map.ring.setAttribute("cy", there.y);
      map.svg.append(map.ring);
      map.tip.hidden = map !== own;
      map.chosen = null;
    }
    own.chosen = point;
    fill(own.tip, point);
    place(own, point);
  };

  const nearest = (points, x, y) => {
    const far = (point) => (point.x - x) ** 2 + (point.y - y) ** 2;
    return points.reduce((best, point) => (!best || far(point) < far(best) ? point : best), null);
  };

  const WAYS = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] };

  // The nearest point that lies within 45 degrees of the arrow.
  const next = (map, [dx, dy]) => {
    const from = map.chosen;
    const ahead = map.points.filter((point) => {
      const [x, y] = [point.x - from.x, point.y - from.y];
      const along = x * dx + y * dy;
      return isShown(point) && along > 0 && along >= Math.abs(x * dy + y * dx);
    });
    return nearest(ahead, from.x, from.y) ?? from;
  };

  for (const map of maps) {
    const { frame, svg } = map;
    frame.tabIndex = 0;
    frame.setAttribute("role", "group");
    frame.setAttribute("aria-label", `${frame.dataset.title}: points by the arrow keys`);
    frame.addEventListener("pointermove", (event) => {
      const shape = svg.getBoundingClientRect();
      const scale = svg.viewBox.baseVal.width / shape.width;
      const [x, y] = [(event.clientX - shape.left) * scale, (event.clientY - shape.top) * scale];
      const found = nearest(map.points.filter(isShown), x, y);
      if (found && Math.hypot(found.x - x, found.y - y) < 24) show(map, found);
      else hide();
    });
    frame.addEventListener("pointerleave", hide);
    frame.addEventListener("blur", hide);
    frame.addEventListener("keydown", (event) => {
      const shown = map.points.filter(isShown);
      if (event.key === "Escape") hide();
      else if (!shown.length || !(event.key in WAYS || event.key === "Home")) return;
      else if (map.chosen === null || event.key === "Home") {
        const { width, height } = svg.viewBox.baseVal;
        show(map, nearest(shown, width / 2, height / 2));
      } else show(map, next(map, WAYS[event.key]));
      event.preventDefault();
    });
  }
}
