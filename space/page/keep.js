// Keeps what the form says in the browser, over a sign-in and a reload, and shows what was changed.
(...values) => {
    const keep = { __type__: "update" };
    if (!window.resmergeReady) return [keep, keep]; // what the page starts with is no change
    const fields = FIELDS;
    const changed = fields
        .map(({ name, label, value }, i) => ({ name, label, value: values[i], usual: value }))
        .filter(({ value, usual }) => (value ?? "") !== (usual ?? ""));
    const kept = Object.fromEntries(changed.map(({ name, value }) => [name, value]));
    const method = values[fields.findIndex(({ name }) => name === "method")];
    const box = document.createElement("p");
    box.className = "rm-chips";
    for (const { name, label, value } of changed) {
        const [owner, parameter] = name.split(".");
        if (!label || (parameter && owner !== method)) continue;
        const chip = document.createElement("span");
        chip.textContent = `${label}: ${value}`;
        box.append(chip, " ");
    }
    return [kept, box.childElementCount ? box.outerHTML : ""];
}
