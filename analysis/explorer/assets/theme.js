// The theme: what the system asks for until the button is pressed; kept for the next visit. And the state of a view, kept
// in its address, so that the address shows the same view to somebody else.
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
    remember(...values) {
      const { path, plain, names } = values[values.length - 1];
      const words = new URLSearchParams();
      for (const { id, value } of dash_clientside.callback_context.inputs_list) {
        if (value === null || value === undefined || JSON.stringify(value) === JSON.stringify(plain[id])) continue;
        for (const one of [value].flat()) words.append(names[id] || id, one);
      }
      const there = path + (words.size ? `?${words}` : "");
      if (location.pathname === path && location.pathname + location.search !== there) history.replaceState(history.state, "", there);
      return there;
    },
  },
});
