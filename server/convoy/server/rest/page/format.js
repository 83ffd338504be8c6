// What people read: numbers with three digits and no exponent, durations with a unit.

const three = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

export function count(value) {
  return whole.format(value);
}

export function number(value) {
  return value === null || value === undefined ? "–" : three.format(value);
}

export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  return seconds < 1 ? `${number(seconds * 1000)} ms` : `${number(seconds)} s`;
}

export function percent(share) {
  return `${(100 * share).toFixed(1)} %`;
}

export function node(name, properties = {}, ...children) {
  const { dataset = {}, attributes = {}, ...rest } = properties;
  const made = Object.assign(document.createElement(name), rest);
  Object.assign(made.dataset, dataset);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}
