// Starts the page: draws its charts, makes its tables sortable, adds its choices, runs the gallery.

import { drawGroup, element, toneTable } from "./charts.mjs";
import { drawGallery } from "./gallery.mjs";
import { addChoices, makeSortable } from "./tables.mjs";

const read = (id) => JSON.parse(document.getElementById(id).textContent);
const { names, groups, titles } = read("charts");
const toneOf = toneTable(names);

function start(section) {
  for (const frame of section.querySelectorAll(".charts")) {
    frame.append(...drawGroup(groups[Number(frame.dataset.group)], toneOf));
    frame.hidden = false;
  }
  for (const table of section.querySelectorAll("table.figures")) makeSortable(table);
  addChoices(section, titles);
  if (section.id === "examples") drawGallery(section, read("gallery"), names, toneOf);
}

for (const section of document.querySelectorAll("main > section")) {
  try {
    start(section);
  } catch (error) { // the other sections stand, and this one says that it does not
    console.error(section.id, error);
    const words = `Could not be drawn: ${error.message}. The figures are in report.json.`;
    section.append(element("p", { class: "warning" }, words));
  }
}
