"""Helpers with which tests read texts and token ids from the page."""

SKY = "Explain why the sky is blue."
FINAL = ".t:not(.draft):not(.rejected)"


def shown_ids(page, side: str) -> list[int]:
    return page.eval_on_selector_all(f".ce-text[data-side={side}] {FINAL}",
                                     "all => all.map(t => +t.dataset.id)")
