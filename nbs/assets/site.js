// What both Quarto's pages and smalldocs' need besides their own scripts.
{
  // The search index is a script: a browser that shows the site from a folder fetches nothing else.
  const here = document.currentScript.src, elsewhere = window.fetch;
  if (location.protocol === "file:" && typeof shownWarning !== "undefined") shownWarning = true;  // Quarto's, that search needs a server
  window.fetch = (url, ...options) => !/search\.json$/.test(url) ? elsewhere(url, ...options) : new Promise((done, failed) => {
    const script = Object.assign(document.createElement("script"), {src: new URL("search.js", here), onerror: failed});
    script.onload = () => done(new Response(JSON.stringify(window.searchIndex)));
    document.head.append(script);
  });

  // Whole words (of names, too: the first of absmean_ternary) before parts of words, and titles before text; what is only like the query comes last.
  const search = window.Fuse?.prototype.search;
  if (search) window.Fuse.prototype.search = function (query, {limit = Infinity} = {}) {
    const words = String(query).toLowerCase().match(/[\p{L}\p{N}_.]+/gu) ?? [];
    const within = text => words.every(word => new RegExp(`(?<![\\p{L}\\p{N}])${word.replaceAll(".", "\\.")}(?![\\p{L}\\p{N}])`, "u").test((text ?? "").toLowerCase()));
    const rank = ({item: {title, section, text}}) => title.toLowerCase() === words.join(" ") ? 0 : within(title) ? 1 : within(section) ? 2 : within(text) ? 3 : 4;
    const key = item => item.href + item.title, found = new Map(search.call(this, query).map(hit => [key(hit.item), hit]));
    for (const item of window.searchIndex) if (!found.has(key(item)) && rank({item}) < 4) found.set(key(item), {item});
    return [...found.values()].map(hit => [rank(hit), hit]).sort((a, b) => a[0] - b[0]).map(pair => pair[1]).slice(0, limit);
  };

  // Icons beside words, or without any, say nothing.
  document.querySelectorAll("i.bi[role=img]:not([aria-label])").forEach(icon => { icon.ariaHidden = "true"; icon.removeAttribute("role"); });

  // Sections of the sidebar open and close with the keyboard, too.
  document.querySelectorAll(".sidebar-item-toggle:not([href])").forEach(toggle => {
    Object.assign(toggle, {tabIndex: 0, role: "button"});
    toggle.addEventListener("keydown", event => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); toggle.click(); } });
  });

  // What scrolls in its own box can be reached, and scrolled, with the keyboard.
  const reachable = () => document.querySelectorAll("main :is(pre, table, .math.display, figure, p, .cell-output-display)").forEach(box => {
    const scrolls = box.scrollWidth > box.clientWidth && getComputedStyle(box).overflowX !== "visible";
    if (scrolls) box.tabIndex = 0; else if (box.tabIndex === 0) box.removeAttribute("tabindex");
  });
  addEventListener("load", reachable);
  addEventListener("resize", reachable);
}
