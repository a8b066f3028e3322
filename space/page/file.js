// Reads a recipe from a file of the visitor's, in the browser: nothing is uploaded.
() =>
    new Promise((resolve) => {
        const chooser = Object.assign(document.createElement("input"), { type: "file", accept: ".yml,.yaml,.json" });
        chooser.onchange = async () => resolve((await chooser.files[0].text()).slice(0, 32768));
        chooser.oncancel = () => resolve({ __type__: "update" });
        chooser.click();
    })
