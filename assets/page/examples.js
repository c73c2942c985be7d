// The row of examples: a fade and the button “More” say that it goes on. The keys reach it, too: the button, and each
// example, which the browser scrolls into view.

function watchExamples() {
  const row = document.querySelector('#ce-examples .gallery'), more = control('ce-more');
  if (!row || !more) return control('ce-one') && setTimeout(watchExamples, 100);        // gradio mounts them later
  const hidden = () => row.scrollWidth - row.clientWidth, atEnd = () => row.scrollLeft >= hidden() - 1;
  const look = () => {
    more.dataset.needed = hidden() > 1;
    row.dataset.fade = atEnd() ? '' : 'end';
  };
  more.addEventListener('click', () => row.scrollTo({ left: atEnd() ? 0 : row.scrollLeft + 0.8 * row.clientWidth, behavior: reducedMotion ? 'instant' : 'smooth' }));
  row.addEventListener('scroll', look, { passive: true });
  new ResizeObserver(look).observe(row);
  look();
}

watchExamples();
