// Light, dark, or as the system has it.

const NEXT = { system: "light", light: "dark", dark: "system" };

/** Make a button go round the themes; the choice is kept in the settings. */
export function themeButton(button, settings) {
  const show = () => {
    const theme = settings.get("theme");
    if (theme === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    button.setAttribute("aria-label", `Theme: ${theme}`);
    button.title = `Theme: ${theme}`;
  };
  button.addEventListener("click", () => {
    settings.set({ theme: NEXT[settings.get("theme")] });
    show();
  });
  show();
}
