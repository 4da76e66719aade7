'use strict';
// Sort a table by one column: numbers by their value, texts by their alphabet, empty cells last.
for (const button of document.querySelectorAll('th button')) {
  button.addEventListener('click', () => {
    const head = button.closest('th');
    const body = button.closest('table').tBodies[0];
    const place = [...head.parentElement.children].indexOf(head);
    const falling = head.getAttribute('aria-sort') === 'none'
      ? head.classList.contains('number') : head.getAttribute('aria-sort') === 'ascending';
    for (const other of head.parentElement.querySelectorAll('[aria-sort]')) other.setAttribute('aria-sort', 'none');
    head.setAttribute('aria-sort', falling ? 'descending' : 'ascending');
    const key = row => {
      const cell = row.children[place];
      return cell.dataset.value ?? (head.classList.contains('number') ? '' : cell.textContent.trim());
    };
    const compare = (one, two) => {
      const [a, b] = [key(one), key(two)];
      if (a === '' || b === '') return (a === '') - (b === '');
      const order = head.classList.contains('number') ? a - b : a.localeCompare(b);
      return falling ? -order : order;
    };
    body.append(...[...body.rows].sort(compare));
  });
}
// Show and hide everything of a run: rows, lines of drawings, pictures.
const chooser = document.querySelector('.runs');
if (chooser) {
  chooser.hidden = false;
  const show = () => {
    const shown = new Set([...chooser.querySelectorAll('input:checked')].map(box => box.value));
    for (const part of document.querySelectorAll('[data-run]')) {
      part.toggleAttribute('hidden', !shown.has(part.dataset.run));
    }
  };
  chooser.addEventListener('change', show);
  show();
}
