"""The site's pages that are made: every key of a recipe, formulas that need no script, every page in the navigation."""

import re
import sys
from pathlib import Path

import pytest
import yaml
from mkdocs.config import load_config
from mkdocs.exceptions import PluginError

from vlm_taid.recipe import Recipe, recipe_parser

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
import docs_hooks  # noqa: E402


def test_the_recipe_page_has_the_keys_and_defaults_of_the_command():
    page = docs_hooks.recipe_page()
    for action in recipe_parser()._actions:
        section, _, key = action.dest.partition(".")
        if key not in ("", "help") and section != "training" and "." not in key:
            table = page.split(f"\n## {section}\n")[1].split("\n#")[0]
            row = re.search(rf"^\| `{key}` \|(.*)\|(.*)\|(.*)\|$", table.replace("\\|", "/"), re.MULTILINE)
            assert row, action.dest
            given = {"None": "null", "True": "true", "False": "false"}.get(str(action.default), str(action.default))
            assert row[2].strip().strip("`") in (given, "required"), action.dest
            assert row[3].strip(), f"{action.dest} has no sentence"
    assert "| `resume` | str | `auto` | auto: go on from the newest whole checkpoint" in page
    assert "### student.lora" in page and "### data.train[]" in page and "teachers" in page
    assert re.search(r"`format` \| messages, llava, vqa", page)


def test_the_snippets_of_options_are_recipes(tmp_path, monkeypatch):
    """Each fits into a whole recipe and says something that the recipe then has."""
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "options.md").read_text()
    snippets = [yaml.safe_load(found) for found in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)]
    assert len(snippets) == page.count("```yaml") >= 6
    for number, snippet in enumerate(snippets):
        whole = {
            "student": {"path": "student"},
            "data": {"train": [{"path": "data/sample/vqa.jsonl", "format": "vqa"}]},
        }
        whole |= {} if "teachers" in snippet else {"teacher": {"path": "teacher"}}
        for section, keys in snippet.items():
            old = whole.get(section)
            whole[section] = {**old, **keys} if isinstance(old, dict) else keys
        file = tmp_path / f"{number}.yaml"
        file.write_text(yaml.safe_dump(whole))
        given = Recipe.load(file).to_dict()
        for section, keys in snippet.items():
            for key, value in keys.items() if isinstance(keys, dict) else []:
                found = given[section][key]
                same = value.items() <= found.items() if isinstance(value, dict) else found == value
                assert same or isinstance(value, list), (section, key)


def test_formulas_are_drawn_without_a_script():
    drawn = docs_hooks.on_page_content('<p>a <span class="arithmatex">\\(p_t &lt; q\\)</span></p>')
    assert drawn.startswith('<p>a <math xmlns="http://www.w3.org/1998/Math/MathML" display="inline">')
    assert "<msub><mi>p</mi><mi>t</mi></msub><mo>&#x0003C;</mo>" in drawn and drawn.endswith("</math></p>")
    with pytest.raises(PluginError, match="nosuch"):
        docs_hooks.on_page_content('<div class="arithmatex">\\[\\nosuch x\\]</div>')


def test_every_page_is_in_the_navigation():
    config = docs_hooks.on_config(load_config(str(ROOT / "mkdocs.yml")))
    for page in (ROOT / "docs").rglob("*.md"):
        assert f"{page.relative_to(ROOT / 'docs')}'" in str(config.nav), page
