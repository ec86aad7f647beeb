// What both Quarto's pages and smalldocs' need besides their own scripts.
{
  // The search index is a script: a browser that shows the site from a folder fetches nothing else.
  const here = document.currentScript.src, elsewhere = window.fetch;
  window.fetch = (url, ...options) => !/search\.json$/.test(url) ? elsewhere(url, ...options) : new Promise((done, failed) => {
    const script = Object.assign(document.createElement("script"), {src: new URL("search.js", here), onerror: failed});
    script.onload = () => done(new Response(JSON.stringify(window.searchIndex.map((entry, n) => ({objectID: String(n), ...entry})))));
    document.head.append(script);
  });

  // Whole words before parts of words, and titles before text; what is only like the query comes last.
  const search = window.Fuse?.prototype.search;
  if (search) window.Fuse.prototype.search = function (query, {limit = Infinity} = {}) {
    const words = String(query).toLowerCase().match(/[\p{L}\p{N}_.]+/gu) ?? [];
    const within = text => words.every(word => new RegExp(`(?<![\\p{L}\\p{N}_])${word.replaceAll(".", "\\.")}(?![\\p{L}\\p{N}_])`, "u").test((text ?? "").toLowerCase()));
    const rank = ({item: {title, section, text}}) => title.toLowerCase() === words.join(" ") ? 0 : within(title) ? 1 : within(section) ? 2 : within(text) ? 3 : 4;
    const key = item => item.href + item.title, found = new Map(search.call(this, query).map(hit => [key(hit.item), hit]));
    for (const item of window.searchIndex) if (!found.has(key(item)) && rank({item}) < 4) found.set(key(item), {item});
    return [...found.values()].map(hit => [rank(hit), hit]).sort((a, b) => a[0] - b[0]).map(pair => pair[1]).slice(0, limit);
  };

  // The buttons that copy code, where the renderer's script will look for them.
  const button = '<button title="Copy to Clipboard" aria-label="Copy the code" class="code-copy-button"><i class="bi"></i></button>';
  document.querySelectorAll(".code-copy-outer-scaffold").forEach(block => block.insertAdjacentHTML("beforeend", button));

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
