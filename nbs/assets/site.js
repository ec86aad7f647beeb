// What both Quarto's pages and smalldocs' need besides their own scripts.
{
  // The search index is a script: a browser that shows the site from a folder fetches nothing else.
  const here = document.currentScript.src, elsewhere = window.fetch;
  window.fetch = (url, ...options) => !/search\.json$/.test(url) ? elsewhere(url, ...options) : new Promise((done, failed) => {
    const script = Object.assign(document.createElement("script"), {src: new URL("search.js", here), onerror: failed});
    script.onload = () => done(new Response(JSON.stringify(window.searchIndex.map((entry, n) => ({objectID: entry.href + "?" + n, ...entry})))));
    document.head.append(script);
  });

  // The buttons that copy code, where the renderer's script will look for them.
  const button = '<button title="Copy to Clipboard" aria-label="Copy the code" class="code-copy-button"><i class="bi"></i></button>';
  document.querySelectorAll(".code-copy-outer-scaffold").forEach(block => block.insertAdjacentHTML("beforeend", button));

  // What scrolls in its own box can be reached, and scrolled, with the keyboard.
  const reachable = () => document.querySelectorAll("main :is(pre, table, .math.display, figure, figure > p)").forEach(box => {
    const scrolls = box.scrollWidth > box.clientWidth && getComputedStyle(box).overflowX !== "visible";
    if (scrolls) box.tabIndex = 0; else if (box.tabIndex === 0) box.removeAttribute("tabindex");
  });
  addEventListener("load", reachable);
  addEventListener("resize", reachable);
}
