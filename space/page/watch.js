// What the page's timer does: ask for news of the job and show what changed, without gradio's server.
async (job, state, log, gates) => {
    const keep = { __type__: "update" };
    const nothing = [keep, keep, keep, keep];
    if (!job) return nothing;
    const seen = window.resmergeSeen?.job === job ? window.resmergeSeen : {};
    const shown = new URLSearchParams({
        log: (log && seen.log) || "",
        picture: (gates && seen.gates) || "",
    });
    try {
        const answer = await fetch(`news/${job}?${shown}`, { signal: AbortSignal.timeout(20000) });
        if (!answer.ok) return nothing;
        const news = await answer.json();
        // A new state makes the page show everything anew.
        if (news.state !== state) return [news.state, keep, keep, keep];
        window.resmergeSeen = { job, log: news.log_stamp, gates: news.gates_stamp };
        return [keep, ...["status", "log", "gates"].map((name) => news[name] ?? keep)];
    } catch {
        return nothing; // the network is away: the next tick asks again
    }
}
