"use strict";
// Paper cannot be clicked: everything folded opens for printing, and closes again.
let opened = [];
addEventListener("beforeprint", () => { opened = [...document.querySelectorAll("details:not([open])")]; for (const d of opened) d.open = true; });
addEventListener("afterprint", () => { for (const d of opened) d.open = false; opened = []; });
