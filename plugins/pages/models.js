"use strict";
// Airflow's light or dark, also when somebody changes it there: it is in this site's own storage.
function paint() {
  let theme = null;
  try { theme = localStorage.getItem("theme"); } catch { /* no storage: as the system is */ }
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
  document.querySelectorAll("iframe").forEach(paintFrame);
}

// What a run left knows no more than the system's light or dark.
function paintFrame(frame) {
  const page = frame.contentDocument?.documentElement;
  if (page) page.style.colorScheme = document.documentElement.dataset.theme ?? "";
}
paint();
addEventListener("storage", paint);
document.addEventListener("load", (event) => { if (event.target.tagName === "IFRAME") paintFrame(event.target); }, true);

document.addEventListener("DOMContentLoaded", () => {
  const airflow = document.body.dataset.airflow;

  // Inside Airflow's page a link may leave its frame only by Airflow's own hand.
  function go(address) {
    if (top === window) { location.assign(address); return; }
    const link = top.document.createElement("a");
    link.href = address;
    link.click();
  }
  for (const link of document.querySelectorAll("a[data-top]")) {
    link.addEventListener("click", (event) => { event.preventDefault(); go(link.href); });
  }

  async function ask(method, path, body) {
    const answer = await fetch(`${airflow}/api/v2/dags/${path}`, {
      method, headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
    });
    const said = await answer.json().catch(() => ({}));
    if (answer.ok) return said;
    throw new Error(typeof said.detail === "string" ? said.detail : `Airflow answered ${answer.status}`);
  }

  for (const form of document.querySelectorAll("form[data-trigger]")) {
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      const dag = form.dataset.trigger, output = form.querySelector("output"), button = form.querySelector("button");
      const conf = {};
      for (const field of form.elements) {
        if (field.name && field.type === "checkbox") { if (field.checked) conf[field.name] = true; }
        else if (field.name) conf[field.name] = field.value;
      }
      button.disabled = true;
      output.textContent = "Airflow is asked ...";
      try {
        if ("unpause" in form.dataset) await ask("PATCH", dag, { is_paused: false });
        const run = await ask("POST", `${dag}/dagRuns`, { logical_date: null, conf });
        output.textContent = "Started.";
        go(`${airflow}/dags/${dag}/runs/${encodeURIComponent(run.dag_run_id)}`);
      } catch (error) {
        output.textContent = error.message;
        button.disabled = false;
      }
    });
  }
});
