from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
OUTPUT = re.compile(r"^```text\n.*?^```$", re.DOTALL | re.MULTILINE)
LONGEST_LINE = 140  # characters


def rows(heading: str) -> list[list[str]]:
    """Return the cells of the table with this heading, row by row."""
    found = re.search(rf"^{re.escape(heading)}\n\| ---.*\n((?:\|.*\n)+)", README, re.MULTILINE)
    assert found, heading
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in found.group(1).splitlines()]


def test_no_line_but_of_output_is_too_long_for_a_screen() -> None:
    assert [line for line in OUTPUT.sub("", README).splitlines() if len(line) > LONGEST_LINE] == []


@pytest.mark.parametrize("anchor", sorted(set(re.findall(r"\]\(#([\w-]+)\)", README))))
def test_every_link_within_the_readme_has_its_heading(anchor: str) -> None:
    headings = re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    assert anchor in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("option", re.findall(r"install\.sh (--[a-z-]+)", README))
def test_every_option_in_the_readme_is_one_of_install_sh(option: str) -> None:
    assert f" {option} " in (ROOT / "install.sh").read_text()


@pytest.mark.parametrize("path", re.findall(r"(?:\]\(|`(?=conf/|tests/))(\w[\w/.-]+)[)`]", README))
def test_every_path_in_the_readme_exists(path: str) -> None:
    assert (ROOT / path).exists()


@pytest.mark.parametrize("row", rows("| to change | open |"), ids=lambda row: row[0])
def test_every_row_of_the_map_leads_to_one_file(row: list[str]) -> None:
    found = re.fullmatch(r"`(.+)`", row[1])
    assert found
    assert (ROOT / "cni_hostport" / found[1]).is_file()


def test_every_room_has_its_row() -> None:
    rooms = {path.parent.name for path in (ROOT / "cni_hostport").glob("*/__init__.py")}
    assert {row[0].strip("`/") for row in rows("| room | what is in it |")} == {"top level", *rooms}
