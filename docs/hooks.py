"""What `mkdocs build` does beyond mkdocs: pages made of files of the repository, and docstrings as the package writes them.

A line `--8<-- "FILE"` of a page stands for that file, a path from the root: Markdown as it is, anything else as a block of code. Links are
those that work in the repository, from where the file lies that holds them. They go to the page that is or includes their target, to a
copy of a picture, or, for other files of the repository, to `repo_url`; without one the link's text stays, and no link.
"""

import os
import re
from pathlib import Path

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
INCLUDE = re.compile(r'^--8<-- "([^"]+)"$', re.M)
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
CODE_OR_LINK = re.compile(rf"^```.*?^```$|`[^`\n]+`|{LINK.pattern}", re.M | re.S)  # code holds no links
PICTURES = {".png", ".svg"}

pages: dict[str, str] = {}  # a Markdown file of the repository, the page that is made of it


def on_files(files, config):
    pages.clear()
    for page in files.documentation_pages():
        pages[f"docs/{page.src_uri}"] = page.src_uri
        for name in INCLUDE.findall(page.content_string):
            if name.endswith(".md"):
                pages[name] = page.src_uri
    pictures = {picture for name in pages for picture in pictures_of(name)}
    for name in sorted(pictures):
        files.append(File.generated(config, f"pictures/{name}", abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown, page, config, files):
    def include(match):
        name = match[1]
        text = (ROOT / name).read_text(encoding="utf-8")
        if name.endswith(".md"):
            return relinked(text, name, page.file.src_uri, config.repo_url)
        return f"```{name.rpartition('.')[2].replace('py', 'python')}\n{text.rstrip()}\n```"

    return INCLUDE.sub(include, relinked(markdown, f"docs/{page.file.src_uri}", page.file.src_uri, config.repo_url))


def target(link, name):
    """The file of the repository that a link in the file `name` leads to, and the anchor there; None for other links."""
    path, _, anchor = link.partition("#")
    if "://" in link or link.startswith("mailto:") or not path:
        return None
    return os.path.normpath(os.path.join(os.path.dirname(name), path)), f"#{anchor}" if anchor else ""


def pictures_of(name):
    links = LINK.findall((ROOT / name).read_text(encoding="utf-8"))
    found = (target(link, name) for _, _, link in links)
    return {path for path, _ in filter(None, found) if Path(path).suffix in PICTURES and (ROOT / path).is_file()}


def relinked(text, name, page, repository):
    """The text of the file `name`, with its links as they have to be in `page`."""

    def link(match):
        mark, label, address = match.groups()
        found = address and target(address, name)
        if not found:
            return match[0]
        path, anchor = found
        if not (ROOT / path).exists():
            raise FileNotFoundError(f"{name}: [{label}]({address}): there is no {path}")
        here = os.path.dirname(page) or "."
        if path in pages:
            return f"{mark}[{label}]({os.path.relpath(pages[path], here)}{anchor})"
        if Path(path).suffix in PICTURES:
            return f"{mark}[{label}]({os.path.relpath(f'pictures/{path}', here)})"
        return f"[{label}]({repository.rstrip('/')}/blob/HEAD/{path}{anchor})" if repository else label

    return CODE_OR_LINK.sub(link, text)


FIELD = re.compile(r"^(\S+(?:, \S+)*) {2,}(\S.*)$")


class Fields(griffe.Extension):
    """Lines `name  what it is` of a docstring, and the indented ones that go on, become a list."""

    def on_object(self, *, obj, **_):
        if obj.docstring is None:
            return
        lines, fields = [], False
        for line in obj.docstring.value.splitlines():
            field = FIELD.match(line)
            if field:
                lines += [] if fields else [""]
                lines.append(f"- `{field[1]}`: {field[2]}")
            else:
                lines.append(f"    {line.lstrip()}" if fields and line.startswith(" ") else line)
            fields = bool(field) or (fields and line.startswith(" "))
        obj.docstring.value = re.sub(r"(?<=\w)\*(?=\w)", r"\*", "\n".join(lines))  # (L*D, B, H) is no emphasis
