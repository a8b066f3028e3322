// What the page's timer does: ask for news of the job and show what changed, without gradio's server.
async (job, state, log, gates) => {
    const keep = { __type__: "update" };
    const nothing = [keep, keep, keep, keep];
    if (!job) return nothing;
    const say = (text) => {
        const box = document.getElementById("lost");
        if (box) box.textContent = text;
    };
    const seen = window.resmergeSeen?.job === job ? window.resmergeSeen : {};
    const shown = new URLSearchParams({
        log: (log && seen.log) || "",
        picture: (gates && seen.gates) || "",
    });
    try {
        const answer = await fetch(`news/${job}?${shown}`, { signal: AbortSignal.timeout(4000) });
        if (answer.status === 404 || answer.status === 401) {
            say("This server was started anew or you were signed out. Reload the page; sign in to see the job.");
            return nothing;
        }
        if (!answer.ok) throw new Error(answer.status);
        const news = await answer.json();
        say("");
        // A new state makes the page show everything anew.
        if (news.state !== state) return [news.state, keep, keep, keep];
        window.resmergeSeen = { job, log: news.log_stamp, gates: news.gates_stamp };
        return [keep, ...["status", "log", "gates"].map((name) => news[name] ?? keep)];
    } catch {
        say("The connection is lost. The merge goes on without this page; asking again…");
        return nothing;
    }
}
