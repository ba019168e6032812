"use strict";
// The theme: as the system says, until somebody presses the button.
(function () {
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  try { chosen = localStorage.getItem("tempo-report-theme"); } catch (error) { /* a page from a file may have no storage */ }
  if (chosen === "light" || chosen === "dark") root.dataset.theme = chosen;
  function isDark() { return root.dataset.theme ? root.dataset.theme === "dark" : dark.matches; }
  function show() { button.textContent = isDark() ? "Light theme" : "Dark theme"; }
  button.addEventListener("click", function () {
    root.dataset.theme = isDark() ? "light" : "dark";
    try { localStorage.setItem("tempo-report-theme", root.dataset.theme); } catch (error) { /* as above */ }
    show();
  });
  dark.addEventListener("change", show);
  button.hidden = false;
  show();
})();
