// Starts the page: draws every section that there is data for, in the order of the document, and removes the others.

const SECTIONS = {
  gates: [report.gates, drawGates], warnings: [report.warnings, drawWarnings], results: [report.results, drawResults],
  paired: [report.paired, drawPaired], claims: [report.claims, drawClaims], agreement: [report.agreement, drawAgreement],
  curves: [training, drawTraining], growth: [report.growth, drawGrowth],
  domains: [report.domains, drawDomains], confusion: [report.confusion, drawConfusion],
  prefix: [report.prefix, drawPrefix], retrieval: [report.retrieval, drawRetrieval], best_of: [report.best_of, drawBestOf],
  calibration: [report.calibration, drawCalibration], examples: [read("gallery"), drawGallery],
  experiments: [report.experiments, drawExperiments], lineage: [report.lineage, drawLineage], notes: [report.notes, drawNotes],
};

drawHeader(document.querySelector("header"));
for (const section of document.querySelectorAll("main > section")) {
  const [data, draw] = SECTIONS[section.id] ?? [];
  if (draw && !isFilled(data)) {
    section.remove();
    continue;
  }
  document.querySelector("nav").append(element("a", { href: `#${section.id}` }, section.dataset.name));
  try {
    draw?.(section, data);
  } catch (error) { // the other sections stand, and this one says that it does not
    console.error(section.id, error);
    section.append(element("p", { class: "warning" }, `Could not be drawn: ${error.message}. The figures are in report.json.`));
  }
}
