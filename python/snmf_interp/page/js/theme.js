// Light, dark, or as the system has it. Remembered where the browser lets a file keep something.

const THEMES = ["auto", "light", "dark"];
const themeListeners = new Set();

function remembered(key) {
  try {
    return localStorage.getItem(key);
  } catch {
    return null; // Storage is forbidden to this file: nothing is remembered.
  }
}

function remember(key, value) {
  try {
    localStorage.setItem(key, value);
  } catch {
    // As above: the choice lasts until the page is closed.
  }
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  const button = document.getElementById("theme");
  button.textContent = { auto: "◐ Auto", light: "○ Light", dark: "● Dark" }[theme];
  button.setAttribute("aria-label", `Colours: ${theme}. Change`);
  for (const listener of themeListeners) listener();
}

function startTheme() {
  const kept = remembered("snmf-theme");
  setTheme(THEMES.includes(kept) ? kept : "auto");
  document.getElementById("theme").addEventListener("click", () => {
    const next = THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % THEMES.length];
    remember("snmf-theme", next);
    setTheme(next);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    for (const listener of themeListeners) listener();
  });
}
