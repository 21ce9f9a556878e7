"use strict";
// Before anything is drawn: the theme that was chosen last, where the browser keeps such things.
try {
  const kept = localStorage.getItem("fa-theme");
  if (kept === "light" || kept === "dark") document.documentElement.dataset.theme = kept;
} catch {
  // No storage: the system's theme.
}
