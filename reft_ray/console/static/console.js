"use strict";
// Keys, hidden text and confirmations. Everything works without this file too, but the keys and showing text.
(() => {
  const ALWAYS = "reft-show-text";

  function show(visible) {
    const text = document.getElementById("text");
    const button = document.getElementById("show");
    if (!text || !button) return;
    text.classList.toggle("hidden", !visible);
    text.toggleAttribute("aria-hidden", !visible);
    button.setAttribute("aria-pressed", String(visible));
    button.firstChild.textContent = visible ? "Hide the text " : "Show the text ";
  }

  function press(key) {
    for (const target of document.querySelectorAll("[data-key]")) {
      if (target.dataset.key === key) {
        target.click();
        return true;
      }
    }
    return false;
  }

  function choose(index) {
    for (const name of ["approve_code", "reject_code"]) {
      const list = document.getElementById(name);
      if (list && list.options[index]) list.selectedIndex = index;
    }
  }

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
    if (event.target.matches("input:not([type=checkbox]), textarea, select")) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    const key = event.key.toLowerCase();
    if (/^[1-9]$/.test(key)) choose(Number(key) - 1);
    else if (press(key)) event.preventDefault();
  });

  document.addEventListener("submit", (event) => {
    const question = event.target.dataset.confirm;
    if (question && !window.confirm(question)) {
      event.preventDefault();
      return;
    }
    // A second press of a key must not decide about the next row.
    if (event.target.dataset.sent) event.preventDefault();
    event.target.dataset.sent = "yes";
  });

  document.addEventListener("DOMContentLoaded", () => {
    const button = document.getElementById("show");
    if (button) {
      button.addEventListener("click", () => show(button.getAttribute("aria-pressed") !== "true"));
      const always = document.getElementById("always");
      const kept = localStorage.getItem(ALWAYS) === "yes";
      if (always) {
        always.checked = kept;
        always.addEventListener("change", () => {
          localStorage.setItem(ALWAYS, always.checked ? "yes" : "no");
          show(always.checked);
        });
      }
      show(Boolean(always) && kept);
    }
    const help = document.getElementById("help");
    if (help) {
      help.addEventListener("click", () => {
        const keys = document.getElementById("keys");
        keys.hidden = !keys.hidden;
        help.setAttribute("aria-expanded", String(!keys.hidden));
      });
    }
    for (const form of document.querySelectorAll("form[data-live]")) {
      form.addEventListener("change", () => form.requestSubmit());
    }
  });
})();
