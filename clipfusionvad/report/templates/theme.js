// Light and dark: the system's choice until the button is pressed. Pictures listen for "themechange".
const root = document.documentElement;
const systemDark = matchMedia("(prefers-color-scheme: dark)");
const probe = document.body.appendChild(document.createElement("i"));
probe.hidden = true;

/** What a colour of the page, "--text", is just now. */
function colour(name) {
  probe.style.color = `var(${name})`;
  return getComputedStyle(probe).color;
}

/** Keep something in the browser, or get it back; pages opened as files may not be allowed to. */
function remembered(key, value) {
  try {
    if (value === undefined) return localStorage.getItem(key);
    localStorage.setItem(key, value);
  } catch {
    // Then it lasts as long as the page.
  }
  return null;
}

function announceTheme() {
  document.dispatchEvent(new Event("themechange"));
}

function setTheme(theme) {
  root.dataset.theme = theme;
  announceTheme();
}

{
  const kept = remembered("theme");
  if (kept === "light" || kept === "dark") root.dataset.theme = kept;
  document.getElementById("theme").addEventListener("click", () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : systemDark.matches;
    const theme = dark ? "light" : "dark";
    setTheme(theme);
    remembered("theme", theme);
  });
  systemDark.addEventListener("change", announceTheme);
  matchMedia("print").addEventListener("change", announceTheme);
}
