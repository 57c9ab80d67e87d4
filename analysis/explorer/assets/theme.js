// The theme: what the system asks for until the button is pressed; kept for the next visit.
window.dash_clientside = Object.assign({}, window.dash_clientside, {
  explorer: {
    theme(clicks) {
      const root = document.documentElement;
      const asked = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
      let now = localStorage.getItem("gradstore-theme") || asked;
      if (clicks) {
        now = now === "dark" ? "light" : "dark";
        localStorage.setItem("gradstore-theme", now);
      }
      root.dataset.theme = now;
      return [now, now === "dark" ? "Light" : "Dark"];
    },
  },
});
