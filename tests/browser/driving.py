"""Helpers with which tests act on the page as a visitor would."""

EXACT = "Exact: same text"


def run_to_end(page) -> None:
    page.click("#ce-run")
    page.wait_for_selector(".ce-status.done")


def open_settings(page) -> None:
    """Open the drawer of settings; nothing happens where it is open."""
    if not page.locator("#ce-close").is_visible():
        page.click("#ce-open")
        page.locator("#ce-close").wait_for()
        page.wait_for_timeout(250)              # the drawer is still sliding in


def close_settings(page) -> None:
    page.click("#ce-close")
    page.locator("#ce-close").wait_for(state="hidden")


def choose_exact(page) -> None:
    page.get_by_label(EXACT).check()


def choose_exit(page, name: str) -> None:
    open_settings(page)
    page.get_by_label("Which exit writes").click()
    page.get_by_role("option", name=name).click()
    close_settings(page)


def open_tab(page, name: str) -> None:
    """Open a tab of the dock under the texts."""
    page.get_by_role("tab", name=name).click()


def set_number(page, label: str, value) -> None:
    """Type a number into the field of a slider in the drawer."""
    box = page.get_by_label(label).and_(page.locator("input[type=number]"))
    box.fill(str(value))
    box.press("Tab")
