// Asks for the page every few seconds and replaces the sections that have changed, with their images loaded before:
// nothing flickers, and the reader stays where he is.
const SECONDS = 3;

async function refresh() {
  let answered = false;
  try {
    const answer = await fetch("/", { cache: "no-store" });
    if (answer.ok) {
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      document.title = page.title;
      for (const section of page.querySelectorAll("main > section")) {
        const shown = document.getElementById(section.id);
        if (shown.innerHTML === section.innerHTML) continue;
        const fresh = document.importNode(section, true);
        await Promise.all([...fresh.querySelectorAll("img")].map((image) => image.decode().catch(() => {})));
        shown.replaceWith(fresh);
      }
      answered = true;
    }
  } catch {
    // the server has ended
  }
  document.getElementById("silent").hidden = answered;
  setTimeout(refresh, 1000 * SECONDS);
}

setTimeout(refresh, 1000 * SECONDS);
