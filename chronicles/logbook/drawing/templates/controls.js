// The reader's controls. Their state is in the page and in its fragment: in MLflow's frame nothing can be stored.
(() => {
  const by = (id) => document.getElementById(id);
  const controls = by("controls"), list = by("entries"), search = by("search"), order = by("order");
  const expand = by("expand"), shown = by("shown");
  const articles = [...list.querySelectorAll("article")];
  const buttons = [...controls.querySelectorAll("[data-filter]")];
  const usual = order.dataset.order;
  const words = new Map(articles.map((each) => [each, each.textContent.toLowerCase()]));
  const state = { kinds: new Set(), order: usual, text: "" };
  // In a frame that was made of text, an address cannot be set and a link to a place leads nowhere.
  const framed = !/^(https?|file):$/.test(location.protocol);

  const wanted = (article) => {
    const kinds = article.dataset.kind.split(" ");
    const asked = state.text.toLowerCase().split(/\s+/).filter(Boolean);
    return (!state.kinds.size || kinds.some((kind) => state.kinds.has(kind))) &&
      asked.every((word) => words.get(article).includes(word));
  };

  function show() {
    const hits = articles.filter((each) => { each.hidden = !wanted(each); return !each.hidden; }).length;
    const filtered = state.kinds.size || state.text.trim();
    shown.textContent = filtered ? `${hits} of ${articles.length}` : "";
    for (const each of buttons) each.setAttribute("aria-pressed", String(state.kinds.has(each.dataset.filter)));
    if (order.dataset.order !== state.order) {
      order.dataset.order = state.order;
      list.append(...[...list.querySelectorAll("article")].reverse());
    }
    order.textContent = state.order === "oldest" ? "Oldest first" : "Newest first";
    if (search.value !== state.text) search.value = state.text;
  }

  function remember() {
    const parts = [];
    if (state.kinds.size) parts.push(`kind=${[...state.kinds].join(",")}`);
    if (state.order !== usual) parts.push(`order=${state.order}`);
    if (state.text.trim()) parts.push(`q=${encodeURIComponent(state.text.trim())}`);
    const hash = parts.length ? `#?${parts.join("&")}` : "#";
    try {
      if (parts.length || location.hash) history.replaceState(null, "", hash);
    } catch { /* no address of its own: the page alone holds the state */ }
  }

  function change(what) { what(); show(); remember(); }

  // ---- details ----
  const evidence = () => [...list.querySelectorAll("details.evidence")];
  function opened(open) {
    expand.setAttribute("aria-expanded", String(open));
    expand.textContent = open ? "Close all" : "Open all";
  }
  function openAround(place) {
    for (let each = place; each; each = each.parentElement) if (each.tagName === "DETAILS") each.open = true;
    const own = place.matches("article") && place.querySelector("details.evidence");
    if (own) own.open = true;
  }

  // ---- places ----
  function reveal(place) {
    const article = place.closest("article");
    if (article?.hidden) { state.kinds.clear(); state.text = ""; show(); }
    openAround(place);
    for (const each of document.querySelectorAll(".target")) each.classList.remove("target");
    place.classList.add("target");
    place.scrollIntoView();
  }

  const decoded = (text) => { try { return decodeURIComponent(text); } catch { return text; } };

  function follow() {
    const hash = location.hash.slice(1);
    if (!hash.startsWith("?")) {
      const place = hash && by(decoded(hash));
      if (place) reveal(place);
      return;
    }
    const asked = new Map(hash.slice(1).split("&").map((part) => part.split(/=(.*)/s)));
    const known = new Set(buttons.map((each) => each.dataset.filter));
    state.kinds = new Set(decoded(asked.get("kind") ?? "").split(",").filter((kind) => known.has(kind)));
    state.order = { oldest: "oldest", newest: "newest" }[asked.get("order")] ?? usual;
    state.text = decoded(asked.get("q") ?? "");
    show();
  }

  for (const each of buttons) each.addEventListener("click", () => change(() => {
    const kind = each.dataset.filter;
    if (!state.kinds.delete(kind)) state.kinds.add(kind);
  }));
  order.addEventListener("click", () => change(() => { state.order = state.order === "oldest" ? "newest" : "oldest"; }));
  search.addEventListener("input", () => change(() => { state.text = search.value; }));
  search.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { event.preventDefault(); change(() => { state.text = ""; }); }
  });
  expand.addEventListener("click", () => {
    const open = expand.getAttribute("aria-expanded") !== "true";
    for (const each of evidence()) each.open = open;
    opened(open);
  });
  addEventListener("hashchange", follow);
  addEventListener("click", (event) => {
    const link = event.target.closest('a[href^="#"]');
    const place = link && by(link.getAttribute("href").slice(1));
    if (!place || !(framed || link.hash === location.hash)) return; // else the address changes, and `follow` is called
    event.preventDefault();
    reveal(place);
  });

  // ---- paper ----
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("details:not([open])")];
    for (const each of closed) each.open = true;
  });
  addEventListener("afterprint", () => { for (const each of closed) each.open = false; });

  if (matchMedia("(max-width: 599px)").matches) { for (const each of evidence()) each.open = false; opened(false); }
  controls.hidden = articles.length === 0;
  const measure = () => document.documentElement.style.setProperty("--controls", `${controls.offsetHeight}px`);
  new ResizeObserver(measure).observe(controls);
  measure();
  follow();
})();
