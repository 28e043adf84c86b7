"""docs/COMPARED.md: what it says of another project has a source, and each source is a commit that was read."""

import re

import launch

PROJECTS = {"mergekit", "PEFT", "TRL, HF Trainer", "axolotl", "unsloth", "litgpt", "nanochat", "torchtitan"}
TEXT = (launch.ROOT / "docs" / "COMPARED.md").read_text()
LISTED = TEXT[TEXT.index("## Sources") :]


def tables() -> list[list[dict[str, str]]]:
    """The rows of each table, by the names of the columns."""
    found = []
    for table in re.findall(r"(?:^\|.*\|\n)+", TEXT, re.M):
        head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
        found.append([dict(zip(head, row, strict=True)) for row in rows])
    return found


def test_each_claim_about_another_project_has_a_source():
    """`–` is the only cell without one: the documentation does not mention it, as far as it was read."""
    names = set()
    for row in (row for rows in tables() for row in rows):
        for project, cell in row.items():
            if project in PROJECTS and cell != "–":
                used = re.findall(r"\[([A-Z]+\d?)\]", cell)
                assert used, f"{row['']}: {project}: {cell!r} has no source"
                names |= set(used)
    assert {project for rows in tables() for project in rows[0]} >= PROJECTS
    assert names == set(re.findall(r"(?:- \*\*|\. )([A-Z]+\d?)(?=\*\* | )", " ".join(LISTED.split())))


def test_each_source_is_a_commit_with_its_date():
    for entry in re.split(r"^- ", LISTED, flags=re.M)[1:]:
        assert re.search(r" [0-9a-f]{7} \(\d{4}-\d\d-\d\d\)|Transformers \S+ as installed", entry), entry
