// What every page must keep to be used by all: a list of its faults, in words. Written after WCAG 2.2.
(() => {
  const faults = [];
  const all = (selector) => [...document.querySelectorAll(selector)];
  const name = (element) => `<${element.tagName.toLowerCase()} ${element.id || element.className} ${element.textContent.trim().slice(0, 30)}>`;
  const need = (is, what, element) => is || faults.push(element ? `${what}: ${name(element)}` : what);
  const isShown = (element) => element.checkVisibility({ visibilityProperty: true });

  need(document.documentElement.lang === "en", "no language");
  need(document.title.length > 3, "no title");
  const ids = all("[id]").map((element) => element.id);
  for (const id of ids) need(ids.filter((other) => other === id).length === 1, `id ${id} comes twice`);
  for (const link of all("a[href]")) need(link.hash && ids.includes(decodeURIComponent(link.hash.slice(1))), "leads nowhere", link);
  for (const attribute of ["aria-labelledby", "aria-describedby", "aria-controls", "for"]) {
    for (const element of all(`[${attribute}]`)) {
      for (const id of element.getAttribute(attribute).split(/\s+/)) need(ids.includes(id), `${attribute} names ${id}`, element);
    }
  }
  for (const picture of all("img")) need(picture.alt.trim(), "picture without alt", picture);
  for (const drawing of all("svg")) {
    const isNamed = drawing.getAttribute("role") === "img" && drawing.getAttribute("aria-label");
    need(isNamed || drawing.getAttribute("aria-hidden") === "true", "drawing without a name", drawing);
  }

  const levels = all("h1, h2, h3, h4, h5, h6");
  need(levels.filter((heading) => heading.tagName === "H1").length === 1, "not one h1");
  levels.reduce((before, heading) => {
    const level = Number(heading.tagName[1]);
    need(level <= before + 1, `heading leaps from ${before}`, heading);
    need(heading.textContent.trim(), "empty heading", heading);
    return level;
  }, 0);

  need(all("main").length === 1, "not one main");
  need(all("body > header").length === 1 && all("body > footer").length === 1, "no header or footer");
  for (const place of all("section, nav")) need(place.getAttribute("aria-labelledby") || place.getAttribute("aria-label"), "landmark without a name", place);
  const first = document.querySelector("a[href], button, input, [tabindex='0']");
  need(first.matches(".skip") && first.hash === "#main", "the first stop does not skip to the content", first);

  for (const table of all("table")) {
    need(table.caption?.textContent.trim(), "table without a caption", table);
    for (const head of table.querySelectorAll("th")) need(["col", "row"].includes(head.scope), "heading without a scope", head);
    for (const row of table.tBodies[0].rows) need(row.querySelectorAll("th[scope=row]").length === 1, "row without a heading", row);
    need(table.parentElement.matches(".scroll[role=region][aria-label][tabindex='0']"), "table that the keyboard cannot scroll", table);
    need(table.querySelectorAll("[aria-sort]").length <= 1, "sorted twice", table);
  }
  for (const stop of all("[tabindex='0']")) need(stop.getAttribute("role") && stop.getAttribute("aria-label"), "stop without a role or a name", stop);
  for (const list of all("ul, ol")) for (const item of list.children) need(item.tagName === "LI", "list with something else", item);
  for (const list of all("dl")) for (const item of list.children) need(["DT", "DD", "DIV"].includes(item.tagName), "list with something else", item);

  need(!all("[tabindex]").some((element) => element.tabIndex > 0), "an order of its own");
  need(!all("a a, button button, a button, button a, summary button, summary a").length, "control within a control");
  for (const element of all("*")) {
    if (!isShown(element) || element.closest("svg")) continue;
    const style = getComputedStyle(element);
    const scrolls = /auto|scroll/.test(style.overflowX + style.overflowY);
    const isCut = element.scrollWidth > element.clientWidth + 1 || element.scrollHeight > element.clientHeight + 1;
    const canBeReached = element.tabIndex >= 0 || element.querySelector("a, button, input, summary");
    if (scrolls && isCut) need(canBeReached || element.tagName === "HTML", "cannot be scrolled by the keyboard", element);
  }
  for (const control of all("button, summary, .theme label")) {
    if (!isShown(control)) continue;
    const { width, height } = control.getBoundingClientRect();
    need(width >= 24 && height >= 24, `smaller than 24 pixels (${width} x ${height})`, control);
  }

  // Contrast of what is really drawn: text against the nearest ground behind it.
  const colour = (text) => {
    const [r, g, b, a = 1] = text.match(/[\d.]+/g).map(Number);
    return { r, g, b, a };
  };
  const luminance = ({ r, g, b }) => {
    const [x, y, z] = [r, g, b].map((c) => c / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const ground = (element) => {
    for (let place = element; place; place = place.parentElement) {
      const found = colour(getComputedStyle(place).backgroundColor);
      if (found.a > 0) return found;
    }
    return colour("rgb(255, 255, 255)");
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let read = 0;
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || element.closest("script, style, .overlay, .unseen, .skip, legend")) continue;
    if (!isShown(element)) continue;
    const style = getComputedStyle(element);
    const [one, two] = [colour(element.closest("svg") ? style.fill : style.color), ground(element)].map(luminance);
    const ratio = (Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05);
    need(ratio >= 4.5, `contrast ${ratio.toFixed(2)}`, element);
    read += 1;
  }
  need(read > 5, "no text was read");
  need(document.documentElement.scrollWidth <= innerWidth, `the page scrolls sideways: ${document.documentElement.scrollWidth} of ${innerWidth}`);
  return [...new Set(faults)];
})()
